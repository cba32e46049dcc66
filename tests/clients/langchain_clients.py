"""langchain-openai against BASE_URL: chat, stream, structured output, tools, responses, completions, embeddings."""

import os
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

base = {"base_url": os.environ["BASE_URL"], "api_key": "none", "model": os.environ["MODEL"]}


class City(BaseModel):
    """A city."""

    city: str = Field(max_length=12)
    population: int = Field(ge=0, le=100_000_000)


@tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}."


for responses in (False, True):
    chat = ChatOpenAI(**base, temperature=0, max_tokens=100, stream_usage=True, use_responses_api=responses)
    reply = chat.invoke("What is the capital of France?")
    assert "Paris" in reply.text and reply.usage_metadata["output_tokens"] > 0, reply
    chunks = list(chat.stream("What is the capital of France?"))
    assert "".join(chunk.text for chunk in chunks) == reply.text and len(chunks) > 2, chunks
    assert any(chunk.usage_metadata for chunk in chunks), "no usage in the stream"

    for method in ("json_schema", "function_calling"):
        answer = chat.with_structured_output(City, method=method).invoke("Name a city and its population.")
        assert isinstance(answer, City), (method, answer)
    if not responses:
        answer = chat.with_structured_output(None, method="json_mode").invoke("Name a city and its population.")
        assert isinstance(answer, dict), answer

    question = HumanMessage("What is the weather in Paris?")
    called = chat.bind_tools([weather], tool_choice="required").invoke([question])
    (call,) = called.tool_calls[:1]
    assert call["name"] == "weather" and set(call["args"]) == {"city"}, call
    results = [ToolMessage(weather.invoke(each["args"]), tool_call_id=each["id"]) for each in called.tool_calls]
    assert chat.invoke([question, called, *results]).text, "no answer after the tool's result"
    print(f"langchain-openai, {'responses' if responses else 'chat'}: text, stream, structured output, tools")

assert OpenAI(**base, temperature=0, max_tokens=8).invoke("1, 2, 3,").strip().startswith("4")
vectors = OpenAIEmbeddings(**base, check_embedding_ctx_length=False).embed_documents(["a cat", "a dog"])
assert len(vectors) == 2 and len(vectors[0]) == len(vectors[1]) > 100
print("langchain-openai: completions, embeddings")
