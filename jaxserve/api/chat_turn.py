"""A turn of a conversation, whatever the wire format: chat completions, responses and messages stand on it.

turn = await begin_turn(serving, request)       # every error of the client's is raised here
async for index, delta in turn.messages: ...    # text, reasoning and tool calls told apart
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from jaxserve.api.constraints import request_grammar
from jaxserve.api.errors import invalid_request
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
from jaxserve.text.chat_template import TemplateError
from jaxserve.text.message import MessageDelta
from jaxserve.types import SamplingParams

MessageDeltas = AsyncGenerator[tuple[int, MessageDelta], None]


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One request, ready to run. messages yields (choice, delta); whoever reads it closes it, which aborts."""

    request: ChatRequest
    num_prompt: int  # tokens
    params: list[SamplingParams]  # one of each choice
    usage: Usage  # grows as messages is read
    messages: MessageDeltas


async def begin_turn(serving: Serving, request: ChatRequest, priority: int = 0) -> ChatTurn:
    """Raises APIError, ParameterError. priority: 0 interactive, 1 batch."""
    serving.require_ready()
    serving.check_model(request.model)
    serving.require_generating()
    num_logprobs = _num_logprobs(request)
    prompt = await encode(serving, render(serving, request), "messages", add_special_tokens=False)
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    wanted = sampling_request(request, max_tokens, num_logprobs)
    params = resolve(serving, wanted, len(prompt), request.num_choices)
    grammar = await request_grammar(serving, request)
    after_text = bool(request.continue_final_message)
    options = generate_options(request, after_text=after_text, priority=priority, grammar=grammar)
    deltas = deltas_of(serving, [prompt], [params], options)
    if request.stream:
        deltas = at_least(deltas, serving.config.stream_interval)
    usage = Usage(len(prompt), serving.config.enable_cache_report)
    return ChatTurn(request, len(prompt), params, usage, _messages(deltas, usage))


def _num_logprobs(request: ChatRequest) -> int | None:
    if not request.logprobs:
        if request.top_logprobs:
            raise invalid_request("top_logprobs is only allowed together with logprobs: true.", "top_logprobs")
        return None
    return request.top_logprobs or 0


def render(serving: Serving, request: ChatRequest) -> str:
    """messages -> the prompt, through the model's chat template.

    Raises APIError 400 with the template's own message.
    """
    tokenizer, _ = serving.require_ready()
    messages = plain_messages(request.messages)
    proceed = bool(request.continue_final_message)
    if proceed and request.add_generation_prompt:
        message = "continue_final_message and add_generation_prompt cannot both be true."
        raise invalid_request(message, "continue_final_message")
    if proceed and messages[-1]["role"] != "assistant":
        message = "continue_final_message needs an assistant message at the end of messages."
        raise invalid_request(message, "continue_final_message")
    if tokenizer.chat_template is None:
        message = "This model has no chat template; start the server with --chat-template, or use /v1/completions."
        raise invalid_request(message, "messages", "no_chat_template")
    add = not proceed if request.add_generation_prompt is None else request.add_generation_prompt
    try:
        return tokenizer.chat_template.render(
            messages,
            add_generation_prompt=add,
            continue_final_message=proceed,
            kwargs=request.chat_template_kwargs,
        )
    except TemplateError as error:
        raise invalid_request(f"The chat template refused the messages: {error}", "messages") from None


async def _messages(deltas: Deltas, usage: Usage) -> MessageDeltas:
    """Counts what passes."""
    try:
        async for index, delta in deltas:
            usage.add(0, index, delta, index == 0)
            yield index, MessageDelta(delta, content=delta.text, finish_reason=delta.finish_reason)
    finally:
        await deltas.aclose()
