"""The body of /v1/responses -> a request of our own, and the chat request that it amounts to."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxserve.api.errors import APIError, invalid_request, renamed, unsupported
from jaxserve.api.metadata import check_metadata
from jaxserve.api.response_items import Item, as_messages
from jaxserve.api.schema import ChatRequest, FieldLog, Refused, as_invalid_request, parse_request, refuse
from jaxserve.text.params import ParameterError

LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (
    LOGPROBS, "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results",
    "web_search_call.action.sources", "message.input_image.image_url", "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)  # fmt: skip
MAX_TOOLS = 128


class TextConfig(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    effort: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None  # the older name of summary


class ResponseStreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_obfuscation: bool | None = None


class ResponseRequest(BaseModel):
    """POST /v1/responses. What is not named here goes to chat's schema: seed, stop, penalties and the like."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str
    input: str | list[Any] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    metadata: Any = None
    store: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    service_tier: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)


# Of what chat's schema would take or ignore, and what OpenAI has here beyond chat.
REFUSED_IN_RESPONSES: dict[str, Refused] = {
    "messages": Refused("this route takes input; send messages to /v1/chat/completions"),
    "prompt": Refused("prompt templates are not kept here; send instructions and input"),
    "conversation": Refused("conversations are not kept; go on with previous_response_id"),
    "background": Refused("responses are not made in the background; stream, or use /v1/batches", (False,)),
    "context_management": Refused("contexts are not compacted; truncation: 'auto' drops the oldest items", ([],)),
    "moderation": Refused("this server does not moderate"),
    "max_tokens": Refused("the field is called max_output_tokens on this route"),
    "max_completion_tokens": Refused("the field is called max_output_tokens on this route"),
    "response_format": Refused("the field is called text.format on this route"),
    "reasoning_effort": Refused("the field is called reasoning.effort on this route"),
    "logprobs": Refused(f"ask with include: ['{LOGPROBS}'] on this route", (False,)),
    "prompt_logprobs": Refused("log-probabilities of the prompt are not part of a response"),
    "n": Refused("a response is one choice", (1,)),
    "functions": Refused("functions are tools on this route", ([],)),
    "function_call": Refused("the field is called tool_choice on this route", ("none", "auto")),
    "continue_final_message": Refused("only /v1/chat/completions has it", (False,)),
    "add_generation_prompt": Refused("only /v1/chat/completions has it", (True,)),
    "rid": Refused("the ids of responses are made by the server; name a request with the header x-request-id"),
    "request_id": Refused("the ids of responses are made by the server; use the header x-request-id"),
}
_NOT_FOR_CHAT = {*ResponseRequest.model_fields, *REFUSED_IN_RESPONSES} - {"model", "temperature", "top_p", "stream"}


def parse_response_request(body: dict[str, Any]) -> ResponseRequest:
    """Raises APIError 400 naming the field at fault. What goes to chat's schema is checked by as_chat_request."""
    for name, rule in REFUSED_IN_RESPONSES.items():
        refuse(rule, name, body.get(name))
    try:
        request = ResponseRequest.model_validate(body)
    except ValidationError as error:
        raise as_invalid_request(error, ResponseRequest) from None
    request.metadata = check_metadata(request.metadata)
    for index, name in enumerate(request.include or ()):
        if name not in INCLUDABLE:
            message = f"Invalid value: {name[:64]!r}. Supported values are: {', '.join(INCLUDABLE)}."
            raise invalid_request(message, f"include[{index}]", "invalid_value")
    if request.stream_options is not None and not request.stream:
        raise invalid_request("stream_options is only allowed together with stream: true.", "stream_options")
    request.tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or ())]
    return request


def _tool(tool: Any, where: str) -> dict[str, Any]:
    """A function tool in the Responses API's flat form, with all of its fields."""
    if not isinstance(tool, dict):
        raise invalid_request(f"Invalid type for '{where}': expected an object.", where, "invalid_type")
    if tool.get("type") != "function":
        shown = repr(tool["type"][:40]) if isinstance(tool.get("type"), str) else "none"
        message = f"'{where}.type' must be 'function'; given: {shown}. This server runs no tools of its own."
        raise unsupported(message, f"{where}.type")
    if "name" not in tool and isinstance(tool.get("function"), dict):
        message = f"'{where}': name, description and parameters stand beside type on this route, not inside function."
        raise invalid_request(message, f"{where}.function")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", **{name: tool.get(name) for name in names}}


def as_chat_request(request: ResponseRequest, body: dict[str, Any], items: list[Item], fields: FieldLog) -> ChatRequest:
    """Raises APIError 400 in the words of this route."""
    chat = {name: value for name, value in body.items() if name not in _NOT_FOR_CHAT}
    chat["messages"] = as_messages(items, request.instructions)
    chat["max_completion_tokens"] = request.max_output_tokens
    if request.wants_logprobs:
        chat |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    if request.tools:
        chat["tools"] = [
            {"type": "function", "function": {k: v for k, v in tool.items() if k != "type" and v is not None}}
            for tool in request.tools
        ]
    if request.tool_choice is not None and (request.tools or request.tool_choice not in ("none", "auto")):
        chat["tool_choice"] = _tool_choice(request.tool_choice)
    if request.tools and request.parallel_tool_calls is not None:
        chat["parallel_tool_calls"] = request.parallel_tool_calls
    if request.text is not None and request.text.format is not None:
        chat["response_format"] = _response_format(request.text.format)
    if request.reasoning is not None and request.reasoning.effort is not None:
        chat["reasoning_effort"] = request.reasoning.effort
    try:
        return parse_request(ChatRequest, chat, fields)
    except (APIError, ParameterError) as error:
        raise in_our_words(error) from None


def _tool_choice(choice: str | dict[str, Any]) -> Any:
    if isinstance(choice, str):
        return choice
    kind, name = choice.get("type"), choice.get("name")
    if kind == "function":
        if not isinstance(name, str):
            raise invalid_request("'tool_choice.name' must be the name of a function.", "tool_choice.name")
        return {"type": "function", "function": {"name": name}}
    if kind == "allowed_tools":
        tools = choice.get("tools")
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise invalid_request("'tool_choice.tools' must be an array of tools.", "tool_choice.tools", "invalid_type")
        named = [{"type": "function", "function": {"name": tool.get("name")}} for tool in tools]
        return {"type": kind, "allowed_tools": {"mode": choice.get("mode"), "tools": named}}
    message = "'tool_choice' must be 'none', 'auto', 'required', or an object of type 'function' or 'allowed_tools'."
    raise unsupported(message, "tool_choice")


def _response_format(given: dict[str, Any]) -> dict[str, Any]:
    """text.format -> response_format: a schema's fields stand in an object of their own there."""
    if given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {key: value for key, value in given.items() if key != "type"}}


_NAMES = (
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("max_completion_tokens", "max_output_tokens"),
    ("max_tokens", "max_output_tokens"),
    ("reasoning_effort", "reasoning.effort"),
    ("messages", "input"),
    ("prompt", "input"),
)


def in_our_words(error: APIError | ParameterError) -> APIError:
    """The same error with the names that fields have on this route."""
    return renamed(error, _NAMES, (("tools.", ".function.", "."),), r"[\1]")
