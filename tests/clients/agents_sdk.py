"""openai-agents against BASE_URL: it speaks /v1/responses, and chat completions when told to."""

import asyncio
import os
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import BaseModel, Field

client = AsyncOpenAI(base_url=os.environ["BASE_URL"], api_key="none")
name = os.environ["MODEL"]
asked: list[str] = []


class City(BaseModel):
    city: str = Field(max_length=12)
    population: int = Field(ge=0, le=100_000_000)


@function_tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather in a city."""
    asked.append(city)
    return f"It is sunny in {city}."


async def main() -> None:
    set_tracing_disabled(True)
    for model in (OpenAIResponsesModel(name, client), OpenAIChatCompletionsModel(name, client)):
        kind = type(model).__name__
        short = ModelSettings(temperature=0, max_tokens=60)
        agent = Agent("plain", instructions="Answer in one sentence.", model=model, model_settings=short)
        result = await Runner.run(agent, "What is the capital of France?")
        assert "Paris" in result.final_output, result.final_output

        streamed = Runner.run_streamed(agent, "What is the capital of France?")
        text = ""
        async for event in streamed.stream_events():
            if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent):
                text += event.data.delta
        assert text == streamed.final_output == result.final_output, (text, streamed.final_output)

        asked.clear()
        must = ModelSettings(temperature=0, max_tokens=80, tool_choice="required")
        agent = Agent("tools", instructions="Use the tool.", model=model, model_settings=must, tools=[weather])
        result = await Runner.run(agent, "What is the weather in Paris?")
        assert asked and set(asked) <= {"Paris", "Rome"} and result.final_output, (asked, result.final_output)

        agent = Agent("typed", model=model, model_settings=short, output_type=City)
        result = await Runner.run(agent, "Name a city and its population.")
        assert isinstance(result.final_output, City), result.final_output
        print(f"openai-agents, {kind}: text, stream, tool, output type")


asyncio.run(main())
