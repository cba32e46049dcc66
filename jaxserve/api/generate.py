"""POST and PUT /generate: SGLang's own route (its "native API"), with its words and shapes.

A request is one prompt or a list of them, as text or ids. One prompt with n = 1 is answered by an object, everything
else by a list, prompt by prompt and choice by choice.
"""

import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.responses import Response

from jaxserve.api import running
from jaxserve.api.completions import check_ids
from jaxserve.api.constraints import request_grammar
from jaxserve.api.errors import invalid_request
from jaxserve.api.generate_schema import GenerateRequest, NativeSampling, PromptRequest, parse_generate
from jaxserve.api.generation import MAX_SEQUENCES, Deltas, at_least, deltas_of, encode_all, resolve, with_errors
from jaxserve.api.http import DONE, event
from jaxserve.api.logprobs import finite
from jaxserve.api.route import Route
from jaxserve.api.serving import Serving
from jaxserve.text.generate import Delta, GenerateOptions
from jaxserve.text.params import ParameterError, SamplingRequest
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import SamplingParams, TokenLogprobs

log = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 128  # SGLang's, or what the context leaves
_NATIVE_NAMES = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    "top_logprobs": "top_logprobs_num",
}


@dataclass(frozen=True, slots=True)
class Job:
    """One request, ready to run."""

    stream: bool
    outputs: "list[Output]"
    single: bool  # the reply is an object, not a list
    deltas: Deltas


@dataclass(slots=True)
class Output:
    """One choice of one prompt as it grows."""

    tokenizer: Tokenizer
    id: str
    prompt_ids: Sequence[int]
    prompt: PromptRequest
    started: float  # monotonic seconds
    text: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    scores: Sequence[TokenLogprobs | None] = ()  # of the prompt's tokens, if they were asked for
    last: Delta | None = None
    seconds: float = 0.0

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.scores = self.scores or delta.prompt_logprobs or ()
        self.last = delta
        if delta.finish_reason is not None:
            self.seconds = time.monotonic() - self.started

    def as_dict(self) -> dict[str, Any]:
        """Everything so far: a streamed chunk holds what the ones before it held."""
        last = self.last
        meta: dict[str, Any] = {
            "id": self.id,
            "finish_reason": None if last is None else _finish_reason(last),
            "prompt_tokens": len(self.prompt_ids),
            "completion_tokens": 0 if last is None else last.num_tokens,
            "cached_tokens": 0 if last is None else last.cached_tokens,
        }
        if last is not None and last.finish_reason is not None:
            meta["e2e_latency"] = self.seconds
        if self.prompt.return_logprob:
            meta |= self._logprobs()
        return {"text": "".join(self.text), "output_ids": list(self.ids), "meta_info": meta}

    def _logprobs(self) -> dict[str, Any]:
        start = self.prompt.logprob_start_len
        before = list(zip(self.prompt_ids, self.scores, strict=True))[start:] if self.scores else []
        after = list(zip(self.ids, self.logprobs, strict=True))
        columns: dict[str, Any] = {}
        for name, pairs in (("input", before), ("output", after)):
            columns[f"{name}_token_logprobs"] = [
                self._triple(None if item is None else item.logprob, token_id) for token_id, item in pairs
            ]
            if self.prompt.top_logprobs_num:
                columns[f"{name}_top_logprobs"] = [None if item is None else self._top(item) for _, item in pairs]
        return columns

    def _top(self, item: TokenLogprobs) -> list[tuple[float | None, int, str | None]]:
        return [self._triple(value, other) for other, value in zip(item.top_ids, item.top_logprobs, strict=True)]

    def _triple(self, logprob: float | None, token_id: int) -> tuple[float | None, int, str | None]:
        text = self.tokenizer.token_text(token_id) if self.prompt.return_text_in_logprobs else None
        return None if logprob is None else finite(logprob), token_id, text


def _finish_reason(delta: Delta) -> dict[str, Any] | None:
    if delta.finish_reason == "length":
        return {"type": "length", "length": delta.num_tokens}
    if delta.finish_reason == "stop":
        return {"type": "stop", "matched": delta.matched_stop}
    if delta.finish_reason == "abort":
        return {"type": "abort", "message": "ended by /abort_request"}
    return None


async def generate_native(serving: Serving, http: Request) -> Response:
    """SGLang's native route: {text or input_ids, sampling_params, …} -> {text, output_ids, meta_info}, or a list."""
    return await ROUTE.respond(serving, http)


async def _begin(serving: Serving, body: dict[str, Any], priority: int) -> Job:
    tokenizer, ready = serving.require_ready()
    request = parse_generate(body, serving.fields)
    wanted = request.prompts()
    num_choices = wanted[0].sampling.num_choices
    if any(each.sampling.num_choices != num_choices for each in wanted):
        raise invalid_request("n must be the same in all sampling_params of a request.", "sampling_params.n")
    if len(wanted) * num_choices > MAX_SEQUENCES:
        message = f"{len(wanted)} prompts with n = {num_choices} are too many; prompts * n <= {MAX_SEQUENCES}."
        raise invalid_request(message, "text")
    prompts = await _encode(serving, [each.prompt for each in wanted])
    params = [
        _resolve(serving, each, len(prompt), ready.max_model_len) for each, prompt in zip(wanted, prompts, strict=True)
    ]
    outputs = _outputs(tokenizer, request, wanted, prompts, num_choices)
    running.also_known_as(*(output.id for output in outputs), *request.rids())
    options = [_options(each.sampling, priority, await _grammar(serving, each.sampling)) for each in wanted]
    deltas = deltas_of(serving, prompts, params, options, partial=True)
    if request.stream:
        deltas = at_least(deltas, serving.config.stream_interval)
    if serving.config.log_requests:
        size, first = sum(map(len, prompts)), params[0][0]
        log.info(
            "request %s: generate, prompts %d, prompt tokens %d, n %d, max_tokens %d, temperature %g, seed %d",
            outputs[0].id, len(prompts), size, num_choices, first.max_tokens, first.temperature, first.seed,
        )  # fmt: skip
    return Job(bool(request.stream), outputs, not request.is_batch and num_choices == 1, deltas)


async def _encode(serving: Serving, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """Texts, or rows of ids."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts:
        return await encode_all(serving, texts, "text", add_special_tokens=True)
    return [check_ids(serving, prompt, "input_ids") for prompt in prompts]


def _resolve(serving: Serving, prompt: PromptRequest, num_prompt: int, max_model_len: int) -> list[SamplingParams]:
    """Raises ParameterError with the names of this route."""
    given = prompt.sampling
    scored = prompt.return_logprob and 0 <= prompt.logprob_start_len < num_prompt
    room = max(1, max_model_len - num_prompt)
    max_tokens = min(DEFAULT_MAX_NEW_TOKENS, room) if given.max_new_tokens is None else given.max_new_tokens
    wanted = SamplingRequest(
        max_tokens=max_tokens,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        min_p=given.min_p,
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        repetition_penalty=given.repetition_penalty,
        logit_bias=given.logit_bias,
        seed=given.seed if given.sampling_seed is None else given.sampling_seed,
        min_tokens=given.min_new_tokens,
        stop_token_ids=tuple(given.stop_token_ids) if given.stop_token_ids else None,
        ignore_eos=given.ignore_eos,
        num_logprobs=prompt.top_logprobs_num if prompt.return_logprob else None,
        num_prompt_logprobs=prompt.top_logprobs_num if scored else None,
    )
    try:
        return resolve(serving, wanted, num_prompt, given.num_choices)
    except ParameterError as error:
        raise _renamed(error) from None


def _renamed(error: ParameterError) -> ParameterError:
    if error.param is None:
        return error
    name, message = _NATIVE_NAMES.get(error.param, error.param), error.message
    for ours, native in _NATIVE_NAMES.items():
        message = message.replace(ours, native)
    where = {"prompt": "text", "top_logprobs_num": name}.get(name, f"sampling_params.{name}")
    return ParameterError(message, where, error.code)


async def _grammar(serving: Serving, given: NativeSampling) -> str | None:
    try:
        return await request_grammar(serving, given)
    except ParameterError as error:
        raise _renamed(error) from None


def _options(given: NativeSampling, priority: int, grammar: str | None) -> GenerateOptions:
    return GenerateOptions(
        stop=given.stops,
        include_stop=bool(given.no_stop_trim),
        skip_special_tokens=given.skip_special_tokens is not False,
        priority=priority,
        after_text=True,
        every_token=True,
        grammar=grammar,
    )


def _outputs(
    tokenizer: Tokenizer,
    request: GenerateRequest,
    wanted: Sequence[PromptRequest],
    prompts: Sequence[Sequence[int]],
    num_choices: int,
) -> list[Output]:
    """One for each choice of each prompt; the id is the client's rid, with the choice behind it where n > 1."""
    started = time.monotonic()
    rids = request.rids() or [secrets.token_hex(16) for _ in wanted]
    if len(rids) < len(wanted):  # one for all
        rids = [f"{rids[0]}-{index}" for index in range(len(wanted))]
    return [
        Output(tokenizer, rid if num_choices == 1 else f"{rid}-{choice}", ids, prompt, started)
        for rid, prompt, ids in zip(rids, wanted, prompts, strict=True)
        for choice in range(num_choices)
    ]


async def _whole(serving: Serving, job: Job) -> Any:
    try:
        async for index, delta in job.deltas:
            job.outputs[index].add(delta)
    finally:
        await job.deltas.aclose()
    values = [output.as_dict() for output in job.outputs]
    return values[0] if job.single else values


def _events(serving: Serving, job: Job) -> AsyncGenerator[bytes, None]:
    return with_errors(_chunks(job))


async def _chunks(job: Job) -> AsyncGenerator[bytes, None]:
    """One event for each delta, each with the whole text so far, then [DONE]."""
    try:
        async for index, delta in job.deltas:
            output = job.outputs[index]
            output.add(delta)
            output.text = ["".join(output.text)]
            value = output.as_dict()
            yield event(value if job.single else value | {"index": index})
        yield DONE
    finally:
        await job.deltas.aclose()


ROUTE: Route[Job] = Route(_begin, _whole, _events)
