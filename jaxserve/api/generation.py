"""What chat and completions share: request -> parameters, prompts -> streams of deltas, counts -> usage."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxserve.api import running
from jaxserve.api.errors import APIError, as_api_error, internal_error, invalid_request, unavailable
from jaxserve.api.http import DONE, event
from jaxserve.api.running import Caller
from jaxserve.api.schema import ChatRequest, CompletionRequest, GenerationRequest
from jaxserve.api.serving import Serving
from jaxserve.text.generate import Delta, GenerateOptions, generate
from jaxserve.text.params import SamplingRequest, resolve_sampling
from jaxserve.text.tokenizer import LONG_TEXT, Tokenizer
from jaxserve.types import SamplingParams

log = logging.getLogger(__name__)
Deltas = AsyncGenerator[tuple[int, Delta], None]

MAX_SEQUENCES = 2048  # prompts times n of one HTTP request; OpenAI's limit for prompts


@dataclass(frozen=True, slots=True)
class Reply:
    """What every chunk and reply of one request repeats."""

    id: str
    object: str
    created: int
    model: str

    def head(self) -> dict[str, Any]:
        return {"id": self.id, "object": self.object, "created": self.created, "model": self.model}


def new_reply(request: GenerationRequest, prefix: str, kind: str) -> Reply:
    """The client's rid as the id, or a new one."""
    reply_id = request.rid or request.request_id or f"{prefix}-{secrets.token_hex(16)}"
    running.also_known_as(reply_id)
    return Reply(reply_id, kind, int(time.time()), request.model)


@dataclass
class Usage:
    """Tokens of one HTTP request: a prompt counts once however many choices it has."""

    prompt_tokens: int
    show_cached: bool
    completion: dict[int, int] = field(default_factory=dict)  # choice index -> tokens sampled so far
    reasoning: dict[int, int] = field(default_factory=dict)  # choice index -> those of them that are thinking
    cached: dict[int, int] = field(default_factory=dict)  # prompt index -> tokens found in the prefix cache

    def add(self, prompt: int, index: int, delta: Delta, first_choice: bool) -> None:
        self.completion[index] = delta.num_tokens
        if first_choice:
            self.cached[prompt] = delta.cached_tokens

    def as_dict(self) -> dict[str, Any]:
        completion = sum(self.completion.values())
        details = {"cached_tokens": sum(self.cached.values())} if self.show_cached else None
        value: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": details,
        }
        if self.reasoning:
            value["completion_tokens_details"] = {"reasoning_tokens": sum(self.reasoning.values())}
        return value


def end_fields(tokenizer: Tokenizer, reason: str | None, matched: int | str | None) -> dict[str, Any]:
    """How a choice ended. stop_reason is vLLM's name for matched_stop, and null for the model's own end."""
    own = isinstance(matched, int) and matched in tokenizer.eos_token_ids
    return {"finish_reason": reason, "matched_stop": matched, "stop_reason": None if own else matched}


def sampling_request(
    request: GenerationRequest,
    max_tokens: int | None,
    num_logprobs: int | None,
    num_prompt_logprobs: int | None = None,
) -> SamplingRequest:
    """The fields of both routes that decide how tokens are sampled, unchecked."""
    return SamplingRequest(
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias,
        seed=request.seed,
        min_tokens=request.min_tokens,
        stop_token_ids=tuple(request.stop_token_ids) if request.stop_token_ids else None,
        ignore_eos=request.ignore_eos,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
    )


def generate_options(
    request: GenerationRequest,
    *,
    after_text: bool,
    priority: int = 0,
    grammar: str | None = None,
    kept_special_ids: frozenset[int] = frozenset(),
) -> GenerateOptions:
    """after_text: the reply goes on with the prompt's text instead of beginning a message.

    priority: 0 interactive, 1 batch. kept_special_ids: not skipped whatever the request says.
    """
    skip = request.skip_special_tokens
    return GenerateOptions(
        stop=request.stops,
        include_stop=bool(request.include_stop_str_in_output or request.no_stop_trim),
        skip_special_tokens=True if skip is None else skip,
        after_text=after_text,
        priority=priority,
        kept_special_ids=kept_special_ids,
        grammar=grammar,
    )


def resolve(
    serving: Serving, wanted: SamplingRequest, num_prompt: int, num_choices: int, *, fewest_tokens: int = 1
) -> list[SamplingParams]:
    """One SamplingParams per choice. fewest_tokens: 0 where max_tokens may be 0. Raises ParameterError."""
    tokenizer, ready = serving.require_ready()
    serving.require_generating()
    params = resolve_sampling(
        wanted,
        tokenizer=tokenizer,
        num_prompt=num_prompt,
        max_model_len=ready.max_model_len,
        draw_seed=serving.draw_seed,
        fewest_tokens=fewest_tokens,
    )
    return [replace(params, choice=choice) for choice in range(num_choices)]


async def encode(serving: Serving, text: str, param: str, *, add_special_tokens: bool) -> list[int]:
    """text -> ids, as encode_all."""
    return (await encode_all(serving, [text], param, add_special_tokens=add_special_tokens))[0]


async def encode_all(
    serving: Serving, texts: Sequence[str], param: str, *, add_special_tokens: bool
) -> list[list[int]]:
    """texts -> ids of each, off the event loop when they are long. Raises APIError 400 for text that is no valid
    Unicode, and for one that is far too long before it is tokenised."""
    tokenizer, ready = serving.require_ready()
    for text in texts:
        if (fewest := tokenizer.fewest_tokens(text)) > ready.max_model_len:
            message = (
                f"{param} has {len(text)} characters, at least {fewest} tokens; this model's maximum context length is "
                f"{ready.max_model_len} tokens (--max-model-len); shorten the prompt"
            )
            raise invalid_request(message, param, "context_length_exceeded")
    try:
        if sum(map(len, texts)) < LONG_TEXT:
            return tokenizer.encode_all(texts, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(tokenizer.encode_all, texts, add_special_tokens=add_special_tokens)
    except ValueError as error:
        raise invalid_request(f"{param!r} cannot be tokenised: {error}.", param) from None


def deltas_of(
    serving: Serving,
    prompts: Sequence[Sequence[int]],
    params: Sequence[Sequence[SamplingParams]],
    options: GenerateOptions | Sequence[GenerateOptions],
    *,
    partial: bool = False,
) -> Deltas:
    """prompts [P], params [P][N] -> (prompt * N + choice, delta) in arrival order; exactly one finish per index.

    options: for all prompts, or one of each. partial: what /abort_request ends has "abort" as its finish reason
    instead of being an error.
    """
    tokenizer, _ = serving.require_ready()
    num_choices = len(params[0])
    limit = serving.client.max_open_requests
    caller = running.current()
    each = [options] * len(prompts) if isinstance(options, GenerateOptions) else options
    interactive = each[0].priority <= 0
    if interactive and limit is not None and len(prompts) * num_choices > limit:
        message = f"{len(prompts)} prompts with n = {num_choices} are more than this server takes at once ({limit})."
        raise invalid_request(message, "n")
    sources = [
        _indexed(
            generate(serving.client, tokenizer, prompt, choices, replace(option, owner=caller)), index * num_choices
        )
        for index, (prompt, choices, option) in enumerate(zip(prompts, params, each, strict=True))
    ]
    merged = sources[0] if len(sources) == 1 else _merge(sources)
    # What a client waits for is measured; a batch waits on purpose, and would hide it.
    refused = _refuse_aborts(merged, caller, partial)
    return serving.metrics.measure(refused) if interactive else refused


async def _indexed(source: Deltas, first: int) -> Deltas:
    try:
        async for choice, delta in source:
            yield first + choice, delta
    finally:
        await source.aclose()


async def _refuse_aborts(source: Deltas, caller: Caller | None, partial: bool) -> Deltas:
    """An end that neither the client nor the model asked for is an error, not a reply."""
    try:
        async for index, delta in source:
            ended = caller is not None and caller.ended
            if delta.finish_reason == "abort" and not (ended and partial):
                if ended:
                    raise invalid_request("The request was ended by /abort_request.", code="request_aborted")
                raise unavailable("The engine gave this request up; send it again.", "request_aborted")
            yield index, delta
    finally:
        await source.aclose()


async def _merge(sources: list[Deltas]) -> Deltas:
    """Yields from all sources as they come; the first error ends all of them."""
    queue: asyncio.Queue[tuple[int, Delta] | asyncio.Future[None]] = asyncio.Queue()

    async def pump(source: Deltas) -> None:
        try:
            async for item in source:
                queue.put_nowait(item)
        finally:
            await source.aclose()

    tasks = [asyncio.ensure_future(pump(source)) for source in sources]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, asyncio.Future):
                item.result()
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def at_least(deltas: Deltas, num_tokens: int) -> Deltas:
    """Joins deltas of a choice until they hold num_tokens; a choice's first and last are never held back."""
    held: dict[int, Delta] = {}
    seen: set[int] = set()
    try:
        async for index, delta in deltas:
            joined = join(held.pop(index), delta) if index in held else delta
            if index in seen and joined.finish_reason is None and len(joined.token_ids) < num_tokens:
                held[index] = joined
                continue
            seen.add(index)
            yield index, joined
    finally:
        await deltas.aclose()


def join(first: Delta, second: Delta) -> Delta:
    """Two deltas of one choice that follow each other, as one."""
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = (first.logprobs or ()) + (second.logprobs or ())
    return replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
    )


def _error_and_done(error: APIError) -> bytes:
    return event(error.body()) + DONE


async def with_errors(
    events: AsyncGenerator[bytes, None], ending: Callable[[APIError], bytes] = _error_and_done
) -> AsyncGenerator[bytes, None]:
    """Ends a stream that has begun and then fails with `ending` of its error; before its first event, raises."""
    begun = False
    try:
        async for item in events:
            yield item
            begun = True
    except Exception as error:
        known = as_api_error(error)
        if not begun:
            raise
        if known is None:
            log.exception("a stream failed")
            known = internal_error()
        yield ending(known)
    finally:
        await events.aclose()


def log_request(
    serving: Serving,
    reply: Reply,
    request: ChatRequest | CompletionRequest,
    params: Sequence[SamplingParams],
    size: int,
) -> None:
    """--log-requests: sizes and parameters, never text."""
    if serving.config.log_requests:
        first = params[0]
        log.info(
            "request %s: %s, prompt tokens %d, n %d, max_tokens %d, temperature %g, seed %d, stream %s",
            reply.id, reply.object, size, request.num_choices, first.max_tokens, first.temperature, first.seed,
            bool(request.stream),
        )  # fmt: skip
