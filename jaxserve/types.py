"""The words that cross a wall: what the front end and the engine say to each other. Standard library only."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKENS = 32

FinishReason = Literal["stop", "length", "abort"]
RequestState = Literal["waiting", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one choice is sampled; every field is valid by construction (the front end parsed it).

    The order of operations is penalties, logit_bias, min_tokens -> temperature -> top_k -> top_p -> min_p.
    """

    max_tokens: int  # num_prompt + max_tokens <= max_model_len; 0: the request ends with its prompt, without a token
    seed: int  # 64 bits, unsigned; the front end draws one when the client gives none
    choice: int = 0  # index of the choice among n; part of the random key
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off; ties at the threshold are kept
    top_p: float = 1.0  # in (0, 1]; of the distribution left by top_k
    min_p: float = 0.0  # in [0, 1]; relative to the most likely token
    presence_penalty: float = 0.0  # once per token that is in the output
    frequency_penalty: float = 0.0  # times its count in the output
    repetition_penalty: float = 1.0  # > 0; tokens of prompt and output
    logit_bias: tuple[tuple[int, float], ...] = ()  # at most MAX_LOGIT_BIAS pairs (token id, bias)
    min_tokens: int = 0  # stop_token_ids cannot be sampled before
    stop_token_ids: tuple[int, ...] = ()  # end-of-sequence ids included unless ignore_eos; at most MAX_STOP_TOKENS
    num_logprobs: int | None = (
        None  # None: no log-probabilities; 0: of the sampled token; n <= 20: and of the n likeliest
    )

    num_prompt_logprobs: int | None = None  # the same for every token of the prompt; such a prompt is computed whole

    @property
    def needs_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def needs_slot_state(self) -> bool:
        """True when the device keeps state for this row (see model.sampling.admit)."""
        return self.needs_penalties or bool(self.logit_bias) or (self.min_tokens > 0 and bool(self.stop_token_ids))


@dataclass(frozen=True, slots=True)
class Request:
    """Front end -> engine; valid by construction. Larger priority numbers yield to smaller ones."""

    id: int
    token_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0  # 0 interactive, 1 batch
    namespace: int = 0  # part of the prefix cache's key (adapter, cache salt)
    grammar: str | None = None  # llguidance's JSON, checked by the front end: the output is a sentence of it
    task: Literal["generate", "embed"] = "generate"  # embed: one vector and no token


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms under the raw distribution (before penalties, bias and temperature)."""

    logprob: float
    top_ids: tuple[int, ...]  # likeliest first; num_logprobs of them
    top_logprobs: tuple[float, ...]
    rank: int | None = None  # 1 = the likeliest; known for tokens of a prompt only


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Sent with every StepEvents. *_total count since the start of the engine."""

    num_running: int
    num_waiting: int
    num_pages: int  # pages that can hold tokens
    num_held_pages: int  # referenced by at least one running sequence
    num_cached_pages: int  # in the prefix tree and held by no sequence
    prompt_tokens_total: int
    cached_tokens_total: int  # of prompt_tokens_total, served from the prefix cache
    generation_tokens_total: int
    preemptions_total: int
    steps_total: int
    padding_tokens_total: int  # computed token positions that held no token
    step_tokens_total: int  # computed token positions that held one
    compilations_total: int  # since ready; anything but 0 is a bug


@dataclass(frozen=True, slots=True)
class StepEvents:
    """Engine -> front end, one message a step: columns of equal length, one entry per token (or per end without a
    token)."""

    request_ids: tuple[int, ...]
    token_ids: tuple[int | None, ...]  # None where a request ends without a token: abort, embed, max_tokens 0, grammar
    finish_reasons: tuple[FinishReason | None, ...]
    cached_tokens: tuple[int, ...]  # prompt tokens of this request that came from the prefix cache
    logprobs: tuple[TokenLogprobs | None, ...]
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Engine -> front end: a part of a prompt's log-probabilities, in order, all parts before the first token.

    logprobs[i] is of the prompt's token first + i; None for token 0, which nothing precedes.
    """

    request_id: int
    first: int
    logprobs: tuple[TokenLogprobs | None, ...]


@dataclass(frozen=True, slots=True)
class Embedded:
    """Engine -> front end: the vector of an "embed" request, before the event that ends it with "stop"."""

    request_id: int
    vector: bytes  # [E] float32, pooled as the model says and normalised to length 1


# Front end -> engine


@dataclass(frozen=True, slots=True)
class AddRequests:
    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class AbortRequests:
    """The engine answers with finish reason "abort" for every id it still knows, and nothing for the others."""

    request_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FlushCache:
    """Drop every prefix that no running sequence holds."""


@dataclass(frozen=True, slots=True)
class StartProfile:
    """Write a profile into folder, until StopProfile or for num_steps steps. Answered by a ProfileReport."""

    folder: str
    num_steps: int | None = None
    python_stack: bool = False


@dataclass(frozen=True, slots=True)
class StopProfile:
    """Answered by a ProfileReport when the profile is written."""


@dataclass(frozen=True, slots=True)
class TakeSnapshot:
    """Answered by a Snapshot, between two steps."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End now; requests that are still running are dropped."""


# Engine -> front end, besides StepEvents


@dataclass(frozen=True, slots=True)
class Progress:
    """One stage of the start: done of total units (bytes, machines, tensors or programs), and a line for people."""

    stage: Literal["download", "nodes", "convert", "load", "compile", "warmup"]
    done: int
    total: int
    message: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """Everything is compiled and was run once."""

    max_model_len: int
    page_size: int
    num_pages: int
    max_running: int
    vocab_size: int
    platform: str  # cpu, gpu or tpu
    device_kind: str
    num_devices: int
    dtype: str
    num_programs: int
    cache_misses: int  # programs that had to be compiled because the persistent cache did not hold them
    seconds: float  # from the engine's start to ready
    embedding_size: int = 0  # numbers of an Embedded vector; 0: this engine makes none
    generates: bool = True  # False: an encoder, which takes "embed" requests only
    quantization: str | None = None  # of the layers' matrices; None: dtype
    kv_cache_dtype: str | None = None  # None: an encoder, which has no cache


@dataclass(frozen=True, slots=True)
class ProfileReport:
    """What became of StartProfile or StopProfile. conflict: one ran already (in folder), or none did."""

    folder: str | None
    error: str | None
    conflict: bool = False


class RequestView(NamedTuple):
    """One request as the scheduler sees it; counts of tokens and pages, never what they hold."""

    id: int
    state: RequestState
    priority: int
    slot: int  # -1: waiting
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    computed_tokens: int  # positions whose keys and values are written
    output_tokens: int
    max_output_tokens: int
    num_pages: int


class StepView(NamedTuple):
    """One step that was read. Its bucket is (decode_rows, prefill_tokens, prefill_rows)."""

    number: int
    launched: float
    read: float
    decode_rows: int
    prefill_tokens: int
    prefill_rows: int
    used_decode: int  # tokens that are not padding
    used_prefill: int


class BucketView(NamedTuple):
    """Use of one compiled shape since ready; its padding is steps * (decode_rows + prefill_tokens) - tokens."""

    decode_rows: int
    prefill_tokens: int
    prefill_rows: int
    steps: int
    tokens: int


class Lifeline(NamedTuple):
    """What became of one request: the states it entered and when, and how it ended."""

    id: int
    priority: int
    marks: tuple[tuple[RequestState, float], ...]
    ended: float | None
    reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine between two steps. Times are seconds of one clock, `now` among them."""

    now: float
    stats: EngineStats
    requests: tuple[RequestView, ...]  # all that run, and the first of those that wait
    page_states: bytes  # uint16, little-endian, of each page but the scratch page: see scheduling.snapshot
    steps: tuple[StepView, ...]  # the latest, oldest first
    buckets: tuple[BucketView, ...]
    lifelines: tuple[Lifeline, ...]  # of the latest that ended, then of those above


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine ends after this message. exit_code: 2 for what the user can mend (flags, files), 1 for a bug."""

    message: str
    exit_code: int = 1


ToEngine = AddRequests | AbortRequests | FlushCache | StartProfile | StopProfile | TakeSnapshot | Stop
FromEngine = StepEvents | PromptLogprobs | Embedded | Progress | Ready | ProfileReport | Snapshot | EngineFailed
