"""The body of Anthropic's /v1/messages -> a request of our own, and the chat request that it amounts to."""

from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxserve.api.errors import APIError, invalid_request, renamed, unsupported
from jaxserve.api.schema import ChatRequest, FieldLog, Refused, as_invalid_request, is_neutral, parse_request
from jaxserve.text.params import ParameterError

MIN_THINKING = 1024  # tokens; Anthropic's least budget
_ROLES = ("user", "assistant", "system")
_MEDIA = ("image", "document", "search_result", "container_upload", "browser_state", "tool_reference")

Block = dict[str, Any]


class Thinking(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=MIN_THINKING)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputConfig(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class CountRequest(BaseModel):
    """POST /v1/messages/count_tokens."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str
    messages: list[Any]
    system: str | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountRequest):
    """POST /v1/messages. What is not named here goes to chat's schema: seed, min_p, penalties and the like."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None

    @property
    def shows_thinking(self) -> bool:
        thinking = self.thinking
        return thinking is not None and thinking.type != "disabled" and thinking.display != "omitted"


# Of what chat's schema would take or ignore, and what Anthropic has beyond chat.
REFUSED_IN_MESSAGES: dict[str, Refused] = {
    "container": Refused("this server runs no code"),
    "mcp_servers": Refused("this server runs no tools of its own", ([],)),
    "context_management": Refused("contexts are not edited by this server"),
    "speed": Refused("there is one speed", ("standard",)),
    "max_completion_tokens": Refused("the field is called max_tokens on this route"),
    "stop": Refused("the field is called stop_sequences on this route", ([],)),
    "response_format": Refused("the field is called output_config.format on this route"),
    "reasoning_effort": Refused("the field is called output_config.effort on this route"),
    "parallel_tool_calls": Refused("the field is called tool_choice.disable_parallel_tool_use on this route"),
    "n": Refused("a message is one choice", (1,)),
    "logprobs": Refused("log-probabilities are not part of a message", (False,)),
    "top_logprobs": Refused("log-probabilities are not part of a message", (0,)),
    "prompt_logprobs": Refused("log-probabilities are not part of a message"),
    "functions": Refused("functions are tools on this route", ([],)),
    "function_call": Refused("the field is called tool_choice on this route", ("none", "auto")),
    "stream_options": Refused("the usage is always part of a stream"),
    "continue_final_message": Refused("end messages with one of the assistant's to go on with it", (False,)),
    "add_generation_prompt": Refused("end messages with one of the assistant's to go on with it", (True,)),
    "rid": Refused("the ids of messages are made by the server; name a request with the header x-request-id"),
    "request_id": Refused("the ids of messages are made by the server; use the header x-request-id"),
}
_FOR_CHAT = ("model", "max_tokens", "temperature", "top_p", "top_k", "stream")
_NOT_FOR_CHAT = {*MessagesRequest.model_fields, *REFUSED_IN_MESSAGES} - {*_FOR_CHAT}


def parse_messages_request(body: dict[str, Any]) -> MessagesRequest:
    """Raises APIError 400 naming the field at fault. What goes to chat's schema is checked by as_chat_request."""
    for name, rule in REFUSED_IN_MESSAGES.items():
        value = body.get(name)
        if value is not None and not is_neutral(value, rule.neutral):
            raise unsupported(f"{name}: not supported: {rule.why}.", name)
    try:
        request = MessagesRequest.model_validate(body)
    except ValidationError as error:
        raise as_invalid_request(error, MessagesRequest) from None
    thinking = request.thinking
    if thinking is not None and thinking.type == "enabled" and thinking.budget_tokens is None:
        raise invalid_request(f"thinking.budget_tokens: at least {MIN_THINKING} is expected.", "thinking.budget_tokens")
    return request


def as_chat_request(
    request: MessagesRequest, body: dict[str, Any], max_tokens: int | None, fields: FieldLog
) -> ChatRequest:
    """max_tokens: in place of the request's; None: what the context leaves. Raises APIError in Anthropic's words."""
    chat = {name: value for name, value in body.items() if name not in _NOT_FOR_CHAT}
    chat |= {"messages": _messages(request), "max_tokens": max_tokens}
    if request.stop_sequences:
        chat["stop"] = request.stop_sequences
    if chat["messages"] and chat["messages"][-1]["role"] == "assistant":
        chat["continue_final_message"] = True
    if request.tools:
        chat["tools"] = [_tool(tool, f"tools.{index}") for index, tool in enumerate(request.tools)]
    if request.tool_choice is not None:
        choice, parallel = _tool_choice(request.tool_choice)
        if request.tools or choice not in ("none", "auto"):
            chat["tool_choice"] = choice
            chat |= {} if parallel else {"parallel_tool_calls": False}
    config = request.output_config
    if config is not None and config.effort is not None:
        chat["reasoning_effort"] = config.effort
    if config is not None and config.format is not None:
        chat["response_format"] = _response_format(config.format)
    thinks = request.thinking is not None and request.thinking.type != "disabled"
    given = body.get("chat_template_kwargs")
    if given is None or isinstance(given, dict):
        chat["chat_template_kwargs"] = {"enable_thinking": thinks, **(given or {})}
    try:
        return parse_request(ChatRequest, chat, fields)
    except (APIError, ParameterError) as error:
        raise in_our_words(error) from None


def _messages(request: MessagesRequest) -> list[dict[str, Any]]:
    """system and messages -> chat messages; turns of one role in a row become one, as Anthropic combines them."""
    found: list[dict[str, Any]] = []
    if request.system:
        found.append({"role": "system", "content": _text(request.system, "system")})
    calls: set[str] = set()
    for index, message in enumerate(request.messages):
        where = f"messages.{index}"
        if not isinstance(message, dict):
            raise _wrong(where, "an object is expected")
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise _wrong(f"{where}.role", f"one of {', '.join(_ROLES)} is expected")
        blocks = _blocks(message.get("content"), f"{where}.content")
        if role == "assistant":
            said = _assistant(blocks, f"{where}.content")
            calls |= {call["id"] for call in said.get("tool_calls", ())}
            new = [said]
        elif role == "user":
            new = _user(blocks, calls, f"{where}.content")
        else:
            new = [{"role": role, "content": _text(blocks, f"{where}.content")}]
        for each in new:
            _append(found, each)
    return found


def _append(messages: list[dict[str, Any]], new: dict[str, Any]) -> None:
    last = messages[-1] if messages else None
    plain = last is not None and last["role"] == new["role"] and set(last) == set(new) == {"role", "content"}
    if last is not None and plain and new["role"] != "tool":
        last["content"] += "\n" + new["content"]
    else:
        messages.append(new)


def _blocks(content: Any, where: str) -> list[Block]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise _wrong(where, "a string or an array of content blocks is expected")
    for index, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise _wrong(f"{where}.{index}", "an object with a type is expected")
    return content


def _text(content: Any, where: str) -> str:
    """A string or text blocks -> one text."""
    texts = []
    for index, block in enumerate(_blocks(content, where)):
        at = f"{where}.{index}"
        if block["type"] != "text":
            raise _unknown_block(block, at, "text")
        texts.append(_string(block, "text", at))
    return "\n".join(texts)


def _user(blocks: list[Block], calls: set[str], where: str) -> list[dict[str, Any]]:
    """Results of tools, each a message of its own, then what the user says."""
    results: list[dict[str, Any]] = []
    said: list[Block] = []
    for index, block in enumerate(blocks):
        at = f"{where}.{index}"
        if block["type"] != "tool_result":
            if block["type"] != "text":
                raise _unknown_block(block, at, "text, tool_result")
            said.append(block)
            continue
        call_id = _string(block, "tool_use_id", at)
        if call_id not in calls:
            message = f"no tool_use block before this one has the id {call_id[:100]!r}"
            raise _wrong(f"{at}.tool_use_id", message)
        text = "" if block.get("content") is None else _text(block["content"], f"{at}.content")
        text = "Error: " + text if block.get("is_error") is True else text
        results.append({"role": "tool", "tool_call_id": call_id, "content": text})
    if said or not results:
        results.append({"role": "user", "content": _text(said, where)})
    return results


def _assistant(blocks: list[Block], where: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for index, block in enumerate(blocks):
        at = f"{where}.{index}"
        match block["type"]:
            case "text":
                texts.append(_string(block, "text", at))
            case "thinking":
                thoughts.append(_string(block, "thinking", at))
            case "redacted_thinking":
                pass  # of another server: nobody here can read it
            case "tool_use":
                given = block.get("input")
                if not isinstance(given, dict):
                    raise _wrong(f"{at}.input", "an object is expected")
                function = {"name": _string(block, "name", at), "arguments": _dumps(given, f"{at}.input")}
                calls.append({"id": _string(block, "id", at), "type": "function", "function": function})
            case _:
                raise _unknown_block(block, at, "text, thinking, redacted_thinking, tool_use")
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts) if texts or not calls else None}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _dumps(value: Any, where: str) -> str:
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:  # JSON is read to a greater depth than it is written
        raise _wrong(where, "it is nested too deeply") from None


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise _wrong(where, "an object is expected")
    kind = tool.get("type")
    if kind not in (None, "custom"):
        shown = repr(kind[:40]) if isinstance(kind, str) else "no string"
        message = f"{where}.type: 'custom' is expected; given: {shown}. This server runs no tools of its own."
        raise unsupported(message, f"{where}.type")
    if not isinstance(tool.get("input_schema"), dict):
        raise _wrong(f"{where}.input_schema", "a JSON schema is expected")
    function = {"name": tool.get("name"), "description": tool.get("description"), "strict": tool.get("strict")}
    function = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def _tool_choice(choice: dict[str, Any]) -> tuple[Any, bool]:
    """-> chat's tool_choice and parallel_tool_calls."""
    single = choice.get("disable_parallel_tool_use")
    if single is not None and not isinstance(single, bool):
        raise _wrong("tool_choice.disable_parallel_tool_use", "a boolean is expected")
    match choice.get("type"):
        case "auto" | "none" as kind:
            return kind, not single
        case "any":
            return "required", not single
        case "tool":
            return {"type": "function", "function": {"name": _string(choice, "name", "tool_choice")}}, not single
    raise _wrong("tool_choice.type", "one of auto, any, tool, none is expected")


def _response_format(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("type") != "json_schema" or not isinstance(given.get("schema"), dict):
        raise _wrong("output_config.format", "{'type': 'json_schema', 'schema': {…}} is expected")
    return {"type": "json_schema", "json_schema": {"name": "output", "strict": True, "schema": given["schema"]}}


def _string(block: Block, name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise _wrong(f"{where}.{name}", "field required" if value is None else "a string is expected")
    return value


def _unknown_block(block: Block, where: str, allowed: str) -> APIError:
    shown = repr(block["type"][:40])
    if block["type"] in _MEDIA:
        return unsupported(f"{where}: content of type {shown} is not supported; only text is.", f"{where}.type")
    return _wrong(f"{where}.type", f"one of {allowed} is expected; given: {shown}")


def _wrong(where: str, message: str) -> APIError:
    return invalid_request(f"{where}: {message}.", where)


_NAMES = (
    ("response_format.json_schema", "output_config.format"),
    ("response_format", "output_config.format"),
    ("reasoning_effort", "output_config.effort"),
    ("parallel_tool_calls", "tool_choice.disable_parallel_tool_use"),
    ("stop", "stop_sequences"),
    ("prompt", "messages"),
)
_INSIDE = (("tools.", ".function.parameters", ".input_schema"), ("tools.", ".function.", "."))


def in_our_words(error: APIError | ParameterError) -> APIError:
    """The same error in Anthropic's words."""
    known = renamed(error, _NAMES, _INSIDE, r".\1")
    if known.code == "context_length_exceeded":  # the words that clients look for before they shorten a conversation
        known.message = f"prompt is too long: {known.message}"
    return known
