"""What a client asks for -> SamplingParams that are valid by construction. The one place where ranges are checked."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxserve.types import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, MAX_TOP_LOGPROBS, SamplingParams

if TYPE_CHECKING:
    from jaxserve.text.tokenizer import Tokenizer

MIN_TEMPERATURE = 1e-5  # below, dividing float32 logits says nothing any more: greedy


class ParameterError(ValueError):
    """A parameter outside its range. param: its name in the request; code: OpenAI's, for clients that branch on it."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """The client's fields, None where it said nothing; unchecked."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[str, float] | Mapping[int, float] | None = None
    seed: int | None = None  # any 64 bits, signed or unsigned
    min_tokens: int | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool | None = None
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None


def resolve_sampling(
    request: SamplingRequest,
    *,
    tokenizer: "Tokenizer",
    num_prompt: int,
    max_model_len: int,
    draw_seed: Callable[[], int],
    fewest_tokens: int = 1,
) -> SamplingParams:
    """Explicit values, else tokenizer.sampling_defaults (generation_config.json), else OpenAI's. -> params of choice 0.

    num_prompt and max_model_len in tokens; draw_seed() -> 64 bits. max_tokens None: what is left of the context.
    fewest_tokens: 0 where max_tokens may be 0, as it may whenever log-probabilities of the prompt are asked for.
    Raises ParameterError; one that is about the context has code "context_length_exceeded".
    """
    fewest_tokens = fewest_tokens if request.num_prompt_logprobs is None else 0
    max_tokens = _max_tokens(request.max_tokens, num_prompt, max_model_len, fewest_tokens)
    min_tokens = _integer("min_tokens", request.min_tokens, 0, low=0, high=max_tokens, advice="at most max_tokens")
    defaults = tokenizer.sampling_defaults
    top_k = _integer("top_k", request.top_k, int(defaults.get("top_k", 0)), low=-1, advice="-1 and 0 mean off")
    temperature = _number("temperature", request.temperature, defaults.get("temperature", 1.0), 0.0, 2.0)
    top_k = 0 if top_k < 0 or top_k >= tokenizer.vocab_size else top_k
    return SamplingParams(
        max_tokens=max_tokens,
        seed=_seed(request.seed, draw_seed),
        temperature=0.0 if top_k == 1 or temperature < MIN_TEMPERATURE else temperature,
        top_k=top_k,
        top_p=_number("top_p", request.top_p, defaults.get("top_p", 1.0), 0.0, 1.0, above=True),
        min_p=_number("min_p", request.min_p, defaults.get("min_p", 0.0), 0.0, 1.0),
        presence_penalty=_number("presence_penalty", request.presence_penalty, 0.0, -2.0, 2.0),
        frequency_penalty=_number("frequency_penalty", request.frequency_penalty, 0.0, -2.0, 2.0),
        repetition_penalty=_repetition_penalty(request.repetition_penalty, defaults),
        logit_bias=_logit_bias(request.logit_bias, tokenizer.vocab_size),
        min_tokens=min_tokens,
        stop_token_ids=_stop_token_ids(request, tokenizer),
        num_logprobs=_num_logprobs("top_logprobs", request.num_logprobs),
        num_prompt_logprobs=_num_logprobs("prompt_logprobs", request.num_prompt_logprobs),
    )


def _max_tokens(given: int | None, num_prompt: int, max_model_len: int, fewest: int) -> int:
    code = "context_length_exceeded"
    if num_prompt < 1:
        raise ParameterError("prompt has 0 tokens; give at least one", "prompt", "empty_prompt")
    fewest = fewest if given == 0 else 1
    if num_prompt + fewest > max_model_len:
        answer = ", at least one of them for the answer" if fewest else ""
        raise ParameterError(
            f"prompt has {num_prompt} tokens; this model's maximum context length is {max_model_len} tokens{answer} "
            "(--max-model-len); shorten the prompt",
            "prompt",
            code,
        )
    max_tokens = _integer("max_tokens", given, max_model_len - num_prompt, low=fewest)
    if num_prompt + max_tokens > max_model_len:
        raise ParameterError(
            f"prompt has {num_prompt} tokens and max_tokens is {max_tokens}, {num_prompt + max_tokens} together; this "
            f"model's maximum context length is {max_model_len} tokens (--max-model-len); shorten the prompt or ask "
            f"for at most {max_model_len - num_prompt}",
            "max_tokens",
            code,
        )
    return max_tokens


def _repetition_penalty(given: float | None, defaults: Mapping[str, float]) -> float:
    return _number("repetition_penalty", given, defaults.get("repetition_penalty", 1.0), 0.0, 100.0, above=True)


def _seed(given: int | None, draw_seed: Callable[[], int]) -> int:
    if given is None:
        return draw_seed() & (2**64 - 1)
    return _integer("seed", given, 0, low=-(2**63), high=2**64 - 1) & (2**64 - 1)


def _num_logprobs(param: str, given: int | None) -> int | None:
    return None if given is None else _integer(param, given, 0, low=0, high=MAX_TOP_LOGPROBS)


def _logit_bias(given: Mapping[Any, float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    if not given:
        return ()
    if not isinstance(given, Mapping):
        raise ParameterError(f"logit_bias is {_shown(given)}; an object of token id to bias is expected", "logit_bias")
    if len(given) > MAX_LOGIT_BIAS:
        raise ParameterError(f"logit_bias has {len(given)} entries; at most {MAX_LOGIT_BIAS} are allowed", "logit_bias")
    biases = {}
    for key, value in given.items():
        token_id = _token_id("logit_bias", key, vocab_size)
        biases[token_id] = _number("logit_bias", value, 0.0, -100.0, 100.0)
    return tuple(sorted((token_id, bias) for token_id, bias in biases.items() if bias != 0))


def _stop_token_ids(request: SamplingRequest, tokenizer: "Tokenizer") -> tuple[int, ...]:
    given = tuple(_token_id("stop_token_ids", id_, tokenizer.vocab_size) for id_ in request.stop_token_ids or ())
    ids = tuple(dict.fromkeys((*(() if request.ignore_eos else tokenizer.eos_token_ids), *given)))
    if len(ids) > MAX_STOP_TOKENS:
        allowed = MAX_STOP_TOKENS - len(ids) + len(given)
        raise ParameterError(f"stop_token_ids has {len(given)} ids; at most {allowed} are allowed", "stop_token_ids")
    return ids


def _token_id(param: str, given: Any, vocab_size: int) -> int:
    token_id = given
    if isinstance(given, str) and given.isascii() and given.isdigit() and len(given) < 12:
        token_id = int(given)
    if type(token_id) is not int or not 0 <= token_id < vocab_size:
        raise ParameterError(f"{param} names token {_shown(given)}; ids are 0 to {vocab_size - 1}", param)
    return token_id


def _integer(
    param: str, given: Any, default: int, *, low: int, high: int | None = None, advice: str | None = None
) -> int:
    if given is None:
        return default
    if isinstance(given, float) and given.is_integer():
        given = int(given)
    if type(given) is not int or given < low or (high is not None and given > high):
        allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        raise ParameterError(
            f"{param} is {_shown(given)}; {allowed} is allowed{f' ({advice})' if advice else ''}", param
        )
    return given


def _number(param: str, given: Any, default: float, low: float, high: float, *, above: bool = False) -> float:
    """above: low itself is not allowed.

    A default outside the range (a strange generation_config.json) is refused too.
    """
    value = default if given is None else given
    if (
        type(value) not in (int, float)
        or not math.isfinite(value)
        or not low <= value <= high
        or (above and value == low)
    ):
        allowed = f"a number above {low:g} and up to {high:g}" if above else f"a number from {low:g} to {high:g}"
        origin = " by the model's generation_config.json" if given is None else ""
        raise ParameterError(f"{param} is {_shown(value)}{origin}; {allowed} is allowed", param)
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
