"""A turn of a conversation, whatever the wire format: chat completions, responses and messages stand on it.

turn = await begin_turn(serving, request)       # every error of the client's is raised here
async for index, delta in turn.messages: ...    # text, reasoning and tool calls told apart
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.api.constraints import turn_grammar
from jaxserve.api.errors import invalid_request, unsupported
from jaxserve.api.generation import (
    Deltas,
    Usage,
    at_least,
    deltas_of,
    encode,
    generate_options,
    resolve,
    sampling_request,
)
from jaxserve.api.messages import plain_messages
from jaxserve.api.schema import ChatRequest
from jaxserve.api.serving import Serving
from jaxserve.api.tools import ToolUse, read_tools
from jaxserve.text.chat_template import TemplateError
from jaxserve.text.dialect import Thinking, thinking_after
from jaxserve.text.message import MessageDelta
from jaxserve.text.message_parser import MessageParser, Reading
from jaxserve.text.tool_messages import fit
from jaxserve.types import SamplingParams

THREAD_PARTS = 64  # messages, parts and tools; 0.1 ms for each
MessageDeltas = AsyncGenerator[tuple[int, MessageDelta], None]


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One request, ready to run. messages yields (choice, delta); whoever reads it closes it, which aborts."""

    request: ChatRequest
    prompt_ids: Sequence[int]
    params: list[SamplingParams]  # one of each choice
    usage: Usage  # grows as messages is read
    tools: ToolUse
    messages: MessageDeltas

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_ids)


async def begin_turn(serving: Serving, request: ChatRequest, priority: int = 0) -> ChatTurn:
    """Raises APIError, ParameterError. priority: 0 interactive, 1 batch."""
    tokenizer, _ = serving.require_ready()
    serving.check_model(request.model)
    serving.require_generating()
    num_logprobs = _num_logprobs(request)
    tools = _tools(serving, request)
    text, thinking = await _rendered(serving, request, tools)
    prompt = await encode(serving, text, "messages", add_special_tokens=False)
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    wanted = sampling_request(request, max_tokens, num_logprobs, request.prompt_logprobs)
    params = resolve(serving, wanted, len(prompt), request.num_choices)
    dialect = serving.dialect()
    reading = dialect.reading(
        tokenizer,
        tools.names,
        thinking=thinking,
        separate=request.separate_reasoning is not False,
        show=request.include_reasoning is not False,
        stream=request.stream_reasoning is not False,
        skip_special_tokens=request.skip_special_tokens is not False,
        one_call=not tools.parallel,
    )
    options = generate_options(
        request,
        after_text=bool(request.continue_final_message),
        priority=priority,
        grammar=await turn_grammar(serving, request, tools, thinking),
        kept_special_ids=dialect.kept_ids(tokenizer, reading),
    )
    deltas = deltas_of(serving, [prompt], [params], options)
    if request.stream:
        deltas = at_least(deltas, serving.config.stream_interval)
    usage = Usage(len(prompt), serving.config.enable_cache_report)
    return ChatTurn(request, prompt, params, usage, tools, _messages(deltas, usage, reading))


def _tools(serving: Serving, request: ChatRequest) -> ToolUse:
    tools = read_tools(request)
    if tools.tools and serving.dialect().format is None:
        message = "This server was started with --tool-call-parser none, so it cannot tell tool calls from text."
        raise unsupported(message, "tools")
    return tools


def _num_logprobs(request: ChatRequest) -> int | None:
    if not request.logprobs:
        if request.top_logprobs:
            raise invalid_request("top_logprobs is only allowed together with logprobs: true.", "top_logprobs")
        return None
    return request.top_logprobs or 0


async def render(serving: Serving, request: ChatRequest) -> str:
    """messages and tools -> the prompt, through the model's chat template.

    Raises APIError 400 with the template's own message.
    """
    return (await _rendered(serving, request, _tools(serving, request)))[0]


async def _rendered(serving: Serving, request: ChatRequest, tools: ToolUse) -> tuple[str, Thinking]:
    """_render(), off the event loop where there is much to go through."""
    parts = sum(len(content) for each in request.messages if isinstance(content := each.get("content"), list))
    if len(request.messages) + parts + len(tools.tools) < THREAD_PARTS:
        return _render(serving, request, tools)
    return await asyncio.to_thread(_render, serving, request, tools)


def _render(serving: Serving, request: ChatRequest, tools: ToolUse) -> tuple[str, Thinking]:
    """-> (prompt, where it leaves the thinking)."""
    tokenizer, _ = serving.require_ready()
    messages = plain_messages(request.messages)
    proceed = bool(request.continue_final_message)
    if proceed and request.add_generation_prompt:
        message = "continue_final_message and add_generation_prompt cannot both be true."
        raise invalid_request(message, "continue_final_message")
    if proceed and (messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1]):
        message = "continue_final_message needs an assistant message without tool calls at the end of messages."
        raise invalid_request(message, "continue_final_message")
    if tokenizer.chat_template is None:
        message = "This model has no chat template; start the server with --chat-template, or use /v1/completions."
        raise invalid_request(message, "messages", "no_chat_template")
    add = not proceed if request.add_generation_prompt is None else request.add_generation_prompt
    try:
        fitted, described = fit(serving.dialect(), messages, tools.tools)
        prompt = tokenizer.chat_template.render(
            fitted,
            tools=described,
            add_generation_prompt=add,
            continue_final_message=proceed,
            kwargs=_template_variables(serving, request),
            prepared=True,
        )
    except TemplateError as error:
        raise invalid_request(f"The chat template refused the messages: {error}", "messages") from None
    except RecursionError:
        raise invalid_request("'tools' or the arguments of a tool call are nested too deeply.", "tools") from None
    return prompt, thinking_after(prompt, messages[-1]["content"] if proceed else None)


def _template_variables(serving: Serving, request: ChatRequest) -> dict[str, Any]:
    """chat_template_kwargs, and what the request says of thinking in the words that the template knows."""
    given, known = request.chat_template_kwargs or {}, serving.dialect().variables
    values: dict[str, Any] = {}
    effort, thinks = request.reasoning_effort, request.thinks
    if effort is not None:
        values |= {"reasoning_effort": effort, "enable_thinking": effort != "none", "thinking": effort != "none"}
    if thinks is not None:
        values |= {"enable_thinking": thinks, "thinking": thinks}
    if not known:
        for name in {"reasoning_effort", "enable_thinking", "thinking"} & request.model_fields_set:
            serving.fields.note(name)
    return {name: value for name, value in values.items() if name in known} | given


async def _messages(deltas: Deltas, usage: Usage, reading: Reading) -> MessageDeltas:
    """Counts what passes."""
    parsers: dict[int, MessageParser] = {}
    try:
        async for index, delta in deltas:
            usage.add(0, index, delta, index == 0)
            parser = parsers.get(index) or parsers.setdefault(index, reading.parser())
            message = parser.advance(delta)
            if reading.splitter is not None:
                usage.reasoning[index] = parser.reasoning_tokens
            yield index, message
    finally:
        await deltas.aclose()
