"""POST /v1/completions (OpenAI API reference, "Create completion")."""

import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.responses import Response

from jaxserve.api.constraints import request_grammar
from jaxserve.api.errors import invalid_request
from jaxserve.api.generation import (
    MAX_SEQUENCES,
    Deltas,
    Reply,
    Usage,
    at_least,
    deltas_of,
    encode,
    encode_all,
    end_fields,
    generate_options,
    log_request,
    new_reply,
    resolve,
    sampling_request,
    with_errors,
)
from jaxserve.api.http import DONE, event
from jaxserve.api.logprobs import CompletionLogprobs, merged, prompt_logprobs_list
from jaxserve.api.route import Route
from jaxserve.api.schema import CompletionRequest, parse_request
from jaxserve.api.serving import Serving
from jaxserve.text.generate import Delta, PromptLogprobs
from jaxserve.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's, on this route only


@dataclass(frozen=True, slots=True)
class Job:
    """One request, ready to run. echoes[p] is the text that the choices of prompt p begin with.

    For each prompt N = num_drawn choices are drawn, and the best num_choices of them are returned.
    """

    request: CompletionRequest
    reply: Reply
    usage: Usage
    deltas: Deltas
    prompts: list[list[int]]
    echoes: tuple[str, ...]
    num_logprobs: int | None

    @property
    def stream(self) -> bool:
        return bool(self.request.stream)

    @property
    def num_choices(self) -> int:
        return self.request.num_choices

    @property
    def num_drawn(self) -> int:
        return self.request.num_drawn

    def head(self) -> dict[str, Any]:
        return self.reply.head()

    def add_usage(self, index: int, delta: Delta) -> None:
        self.usage.add(index // self.num_drawn, index, delta, index % self.num_drawn == 0)


async def create_completion(serving: Serving, http: Request) -> Response:
    """Every error is raised before the first byte of the reply."""
    return await ROUTE.respond(serving, http)


async def _begin(serving: Serving, body: dict[str, Any], priority: int) -> Job:
    serving.require_ready()
    request = parse_request(CompletionRequest, body, serving.fields)
    serving.check_model(request.model)
    serving.require_generating()
    _check(request)
    prompts = await _encode_prompts(serving, request)
    grammar = await request_grammar(serving, request)
    max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    wanted = sampling_request(request, max_tokens, _num_logprobs(request), _num_prompt_logprobs(request))
    params = [resolve(serving, wanted, len(prompt), request.num_drawn, fewest_tokens=0) for prompt in prompts]
    num_prompt = sum(len(prompt) for prompt in prompts)
    echoes = _echoes(serving, request, prompts)
    usage = Usage(num_prompt, serving.config.enable_cache_report)
    reply = new_reply(request, "cmpl", "text_completion")
    options = generate_options(request, after_text=True, priority=priority, grammar=grammar)
    deltas = deltas_of(serving, prompts, params, options)
    if request.stream:
        deltas = at_least(deltas, serving.config.stream_interval)
    log_request(serving, reply, request, params[0], num_prompt)
    return Job(request, reply, usage, deltas, prompts, echoes, request.logprobs)


def _check(request: CompletionRequest) -> None:
    if request.num_drawn < request.num_choices:
        raise invalid_request("best_of must not be smaller than n.", "best_of")
    if request.num_drawn > request.num_choices and request.stream:
        raise invalid_request("best_of larger than n cannot be streamed: the best is known at the end.", "best_of")
    prompt = request.prompt
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    num_prompts = len(prompt) if several else 1
    if num_prompts * request.num_drawn > MAX_SEQUENCES:
        what = "n" if request.num_drawn == request.num_choices else "best_of"
        message = f"{num_prompts} prompts with {what} = {request.num_drawn} are too many; "
        raise invalid_request(f"{message}prompts * {what} <= {MAX_SEQUENCES}.", "prompt")


def _num_logprobs(request: CompletionRequest) -> int | None:
    """best_of ranks by log-probability, so it needs them whether the reply has them or not."""
    return 0 if request.logprobs is None and request.num_drawn > request.num_choices else request.logprobs


def _num_prompt_logprobs(request: CompletionRequest) -> int | None:
    """Enough for the columns of an echo and for vLLM's list."""
    asked = [request.prompt_logprobs, request.logprobs if request.echo else None]
    return max((count for count in asked if count is not None), default=None)


async def _encode_prompts(serving: Serving, request: CompletionRequest) -> list[list[int]]:
    """str, [str], [int] or [[int]] -> token ids per prompt. Raises APIError 400 for ids outside the vocabulary."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [await encode(serving, prompt, "prompt", add_special_tokens=True)]
    if not prompt:
        raise invalid_request("'prompt' must not be an empty array.", "prompt", "empty_prompt")
    if isinstance(prompt[0], str):
        texts = [text for text in prompt if isinstance(text, str)]
        return await encode_all(serving, texts, "prompt", add_special_tokens=True)
    rows = [prompt] if isinstance(prompt[0], int) else prompt
    return [check_ids(serving, row, "prompt") for row in rows]


def check_ids(serving: Serving, token_ids: Any, param: str) -> list[int]:
    """token_ids -> the same ids. Raises APIError 400 for one that the model does not have."""
    _, ready = serving.require_ready()
    largest = max(token_ids, default=0)
    if largest >= ready.vocab_size:
        message = f"Token id {largest} in {param!r} is not in the vocabulary: ids are 0 to {ready.vocab_size - 1}."
        raise invalid_request(message, param)
    return list(token_ids)


def _echoes(serving: Serving, request: CompletionRequest, prompts: list[list[int]]) -> tuple[str, ...]:
    """The prompts as they are echoed: as the client wrote them, or decoded from its ids."""
    if not request.echo:
        return ("",) * len(prompts)
    given = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    if isinstance(given[0], str):
        return tuple(str(item) for item in given)
    tokenizer, _ = serving.require_ready()
    return tuple(tokenizer.decode(ids, skip_special_tokens=False) for ids in prompts)


def _columns(tokenizer: Tokenizer, job: Job) -> list[CompletionLogprobs]:
    skip = job.request.skip_special_tokens is not False
    return [CompletionLogprobs(tokenizer, skip, len(echo)) for echo in job.echoes for _ in range(job.num_drawn)]


def _echo_columns(job: Job, columns: CompletionLogprobs, index: int, delta: Delta) -> dict[str, list[Any]] | None:
    """The echoed prompt's columns with the first delta of a choice, where they are asked for."""
    if job.num_logprobs is None or not job.request.echo or delta.prompt_logprobs is None:
        return None
    prompt = index // job.num_drawn
    return columns.add_prompt(job.echoes[prompt], job.prompts[prompt], delta.prompt_logprobs, job.num_logprobs)


async def _whole(serving: Serving, job: Job) -> dict[str, Any]:
    tokenizer, _ = serving.require_ready()
    columns = _columns(tokenizer, job)
    texts = [[echo] for echo in job.echoes for _ in range(job.num_drawn)]
    ends: list[Delta | None] = [None] * len(texts)
    scores: list[PromptLogprobs | None] = [None] * len(texts)
    try:
        async for index, delta in job.deltas:
            job.add_usage(index, delta)
            texts[index].append(delta.text)
            scores[index] = scores[index] or delta.prompt_logprobs
            _echo_columns(job, columns[index], index, delta)
            if job.num_logprobs is not None:
                columns[index].add(delta.text, delta.token_ids, delta.logprobs or ())
            if delta.finish_reason is not None:
                ends[index] = delta
    finally:
        await job.deltas.aclose()
    choices = []
    for place, index in enumerate(_best(job, ends)):
        end = ends[index]
        assert end is not None
        choice = {
            "index": place,
            "text": "".join(texts[index]),
            "logprobs": None if job.num_logprobs is None else columns[index].columns,
            **end_fields(tokenizer, end.finish_reason, end.matched_stop),
        }
        if job.request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = _prompt_logprobs(tokenizer, job, index, scores[index])
        choices.append(choice)
    tail = {"usage": job.usage.as_dict(), "system_fingerprint": None}
    return {**job.head(), "choices": choices, **tail}


def _best(job: Job, ends: list[Delta | None]) -> list[int]:
    """The choices that are returned, prompt by prompt: with best_of the likeliest by token first, else all in order."""
    assert None not in ends, "every choice ends with a finish reason"
    if job.num_drawn == job.num_choices:
        return list(range(len(ends)))

    def mean_logprob(index: int) -> float:
        end = ends[index]
        return -math.inf if end is None or end.mean_logprob is None else end.mean_logprob

    drawn = [range(first, first + job.num_drawn) for first in range(0, len(ends), job.num_drawn)]
    return [index for group in drawn for index in sorted(group, key=mean_logprob, reverse=True)[: job.num_choices]]


def _prompt_logprobs(
    tokenizer: Tokenizer, job: Job, index: int, scores: PromptLogprobs | None
) -> list[dict[str, Any] | None]:
    assert scores is not None and job.request.prompt_logprobs is not None, "they come with a choice's first delta"
    return prompt_logprobs_list(tokenizer, job.prompts[index // job.num_drawn], scores, job.request.prompt_logprobs)


def _events(serving: Serving, job: Job) -> AsyncGenerator[bytes, None]:
    return with_errors(_chunks(serving, job))


async def _chunks(serving: Serving, job: Job) -> AsyncGenerator[bytes, None]:
    """Text chunks (the first begins with the echo), one finish chunk per index, usage if asked for, [DONE]."""
    tokenizer, _ = serving.require_ready()
    columns = _columns(tokenizer, job)
    opened: set[int] = set()

    def chunk(index: int, text: str, logprobs: Any = None, end: Delta | None = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None, "matched_stop": None}
        if end is not None:
            choice |= end_fields(tokenizer, end.finish_reason, end.matched_stop)
        value = {**job.head(), "choices": [choice]}
        if job.request.include_usage:
            value["usage"] = job.usage.as_dict() if job.request.usage_in_every_chunk else None
        return event(value)

    try:
        async for index, delta in job.deltas:
            job.add_usage(index, delta)
            parts, text = [], delta.text
            logprobs = _echo_columns(job, columns[index], index, delta)
            if job.num_logprobs is not None and delta.token_ids:
                logprobs = merged(logprobs, columns[index].add(delta.text, delta.token_ids, delta.logprobs or ()))
            if index not in opened:
                opened.add(index)
                text = job.echoes[index // job.num_drawn] + text
            if text or logprobs is not None:
                parts.append(chunk(index, text, logprobs))
            if delta.finish_reason is not None:
                parts.append(chunk(index, "", end=delta))
            if parts:
                yield b"".join(parts)
        if job.request.include_usage:
            yield event({**job.head(), "choices": [], "usage": job.usage.as_dict()})
        yield DONE
    finally:
        await job.deltas.aclose()


ROUTE: Route[Job] = Route(_begin, _whole, _events)
