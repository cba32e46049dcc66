"""pydantic-ai against BASE_URL: chat and responses models, structured output by a required tool and by a schema."""

import asyncio
import os

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

provider = OpenAIProvider(base_url=os.environ["BASE_URL"], api_key="none")
name = os.environ["MODEL"]
settings = ModelSettings(temperature=0, max_tokens=100)


class City(BaseModel):
    city: str = Field(max_length=12)
    population: int = Field(ge=0, le=100_000_000)


async def main() -> None:
    for model in (OpenAIChatModel(name, provider=provider), OpenAIResponsesModel(name, provider=provider)):
        agent = Agent(model, instructions="Answer in one sentence.", model_settings=settings)
        result = await agent.run("What is the capital of France?")
        assert "Paris" in result.output, result.output
        assert result.usage.input_tokens > 0 and result.usage.output_tokens > 0, result.usage

        async with agent.run_stream("What is the capital of France?") as streamed:
            parts = [part async for part in streamed.stream_text(delta=True)]
        assert "".join(parts) == result.output and len(parts) > 1, parts

        for output in (City, NativeOutput(City)):
            typed = Agent(model, output_type=output, model_settings=settings)
            answer = (await typed.run("Name a city and its population.")).output
            assert isinstance(answer, City), answer
        print(f"pydantic-ai, {type(model).__name__}: text, stream, output by tool and by schema")


asyncio.run(main())
