"""What a client may send to the two generation routes, and what becomes of every field it names.

A field is one of three things, and each is said somewhere below:
  honoured                     a field of ChatRequest or CompletionRequest
  known, with an effect        REFUSED: a value that would change the answer is a 400; a neutral one is accepted
  without effect, or unknown   accepted, and logged once by name; WITHOUT_EFFECT has those that are known
docs/api.md has a row of each, with the test that shows it (make docs writes those of the last two kinds).
Ranges are checked where the words become SamplingParams (text.params), so that the library interface has them too.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from jaxserve.api.errors import invalid_request, unsupported

log = logging.getLogger(__name__)

MAX_CHOICES = 128  # OpenAI's limit for n
MAX_STOPS = 4  # OpenAI's limit
MAX_STOP_LENGTH = 4096  # characters
MAX_ID_LENGTH = 256
MAX_LOGGED_FIELDS = 256

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(BaseModel):
    """The fields that both routes share. Types are strict: "1" is no number, and true is no integer."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    # The form of the answer, one of them at most; text.grammar knows their types, which peers define differently.
    response_format: Any = None
    json_schema: Any = None  # SGLang, as regex and ebnf
    regex: Any = None
    ebnf: Any = None
    grammar: Any = None  # llama.cpp: GBNF, or Lark
    structured_outputs: Any = None  # vLLM, as the guided_ ones, its older names
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None  # SGLang's name for include_stop_str_in_output
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None  # vLLM's
    rid: Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)] | None = None  # SGLang: becomes the reply's id
    request_id: Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)] | None = None  # vLLM's name for it

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MAX_STOPS:
            raise ValueError(f"{len(stops)} stop strings were given; at most {MAX_STOPS} are allowed")
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        if max(map(len, stops), default=0) > MAX_STOP_LENGTH:
            raise ValueError(f"a stop string may have at most {MAX_STOP_LENGTH} characters")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_in_every_chunk(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class ThinkingOption(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["enabled", "disabled", "auto"]


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None  # wins over max_tokens, its older name
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None  # read by api.tools, as the next two
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    enable_thinking: bool | None = None  # Qwen's own API
    thinking: ThinkingOption | None = None  # DeepSeek's and GLM's
    separate_reasoning: bool | None = None  # SGLang: false leaves <think> ... </think> in the text
    stream_reasoning: bool | None = None  # SGLang: false sends the thinking in one piece
    include_reasoning: bool | None = None  # vLLM: false leaves the thinking out

    @property
    def thinks(self) -> bool | None:
        """Whether the model shall think first; None: as its template has it."""
        if self.enable_thinking is not None or self.thinking is None:
            return self.enable_thinking
        return {"enabled": True, "disabled": False}.get(self.thinking.type)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None  # OpenAI allows 5
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @property
    def num_drawn(self) -> int:
        """Choices that are drawn for each prompt, of which the best n are returned."""
        return self.num_choices if self.best_of is None else self.best_of


@dataclass(frozen=True, slots=True)
class Refused:
    """neutral: values that ask for nothing and are accepted, besides null. why: the end of the error message."""

    why: str
    neutral: tuple[Any, ...] = ()


_TOOLS = Refused("this is the older form; send tools and tool_choice", ([], "none", "auto"))
_CACHE = Refused("separate prefix caches are not supported")
_SAMPLER = "this sampler is not supported; temperature, top_k, top_p and min_p are"

REFUSED: dict[str, Refused] = {
    "functions": _TOOLS,
    "function_call": _TOOLS,
    "structural_tag": Refused("text that changes between free and constrained is not supported; a grammar can say it"),
    "modalities": Refused("only text is generated here", ([], ["text"])),
    "audio": Refused("only text is generated here"),
    "web_search_options": Refused("this server does not search the web"),
    "moderation": Refused("this server does not moderate"),
    "suffix": Refused("text is generated after a prompt only, not between a prompt and a suffix", ("",)),
    "return_token_ids": Refused("token ids are not part of the reply", (False,)),
    "return_tokens_as_token_ids": Refused("token ids are not part of the reply", (False,)),
    "return_hidden_states": Refused("hidden states are not part of the reply", (False,)),
    "use_beam_search": Refused("beam search is not supported; use n and temperature", (False,)),
    "length_penalty": Refused("beam search is not supported", (1,)),
    "best_of_sequences": Refused("beam search is not supported"),
    "early_stopping": Refused("beam search is not supported", (False,)),
    "stop_regex": Refused("stop takes strings, not patterns", ("", [])),
    "bad_words": Refused("use logit_bias with the ids of their tokens", ([],)),
    "allowed_token_ids": Refused("use logit_bias with the ids of their tokens"),
    "truncate_prompt_tokens": Refused("prompts are never cut; send a shorter one"),
    "logits_processors": Refused("custom code is not run by this server", ([],)),
    "custom_logit_processor": Refused("custom code is not run by this server", ("",)),
    "custom_params": Refused("custom code is not run by this server"),
    "lora_path": Refused("adapters are not supported yet", ("",)),
    "session_params": Refused("sessions are not supported; common prefixes are cached by themselves"),
    "chat_template": Refused("a template per request is not supported; start the server with --chat-template"),
    "documents": Refused("documents are not supported; put their text into a message", ([],)),
    "prompt_embeds": Refused("only text and token ids are accepted"),
    "input_embeds": Refused("only text and token ids are accepted"),
    "input_ids": Refused("/generate takes them, and /v1/completions as its prompt"),
    "kv_transfer_params": Refused("prompts are computed where they are answered"),
    "vllm_xargs": Refused("there are no extensions to pass them to", ({},)),
    "repetition_detection": Refused("use frequency_penalty or repetition_penalty"),
    "guided_whitespace_pattern": Refused("whitespace of JSON is always at most one space"),
    "format": Refused("the form of the answer is called response_format on this route", ("",)),
    "options": Refused("its fields are fields of the request on this route", ({},)),
    "thinking_token_budget": Refused("a token budget for thinking is not supported; use max_tokens"),
    "detokenize": Refused("replies are always text", (True,)),
    "cache_salt": _CACHE,
    "extra_key": _CACHE,
    "priority": Refused("priorities per request are not supported", (0,)),
    "max_new_tokens": Refused("the field is called max_tokens on this route"),
    "min_new_tokens": Refused("the field is called min_tokens on this route", (0,)),
    "n_predict": Refused("the field is called max_tokens on this route"),
    "repeat_penalty": Refused("the field is called repetition_penalty on this route", (1,)),
    "typical_p": Refused(_SAMPLER, (1,)),
    "top_a": Refused(_SAMPLER, (0,)),
    "tfs_z": Refused(_SAMPLER, (1,)),
    "mirostat": Refused(_SAMPLER, (0,)),
    "xtc_probability": Refused(_SAMPLER, (0,)),
    "dry_multiplier": Refused(_SAMPLER, (0,)),
    "dynatemp_range": Refused(_SAMPLER, (0,)),
    "logprobs_mode": Refused("log-probabilities are always of the raw distribution", ("raw_logprobs",)),
}

# Effects that exist on one route only.
REFUSED_IN_CHAT: dict[str, Refused] = {
    "prompt": Refused("this route takes messages; send prompts to /v1/completions"),
    "echo": Refused("only /v1/completions has it", (False,)),
    "best_of": Refused("only /v1/completions has it", (1,)),
    "add_special_tokens": Refused("the chat template writes them", (False,)),
}
REFUSED_IN_COMPLETIONS: dict[str, Refused] = {
    "messages": Refused("this route takes a prompt; send messages to /v1/chat/completions"),
    "max_completion_tokens": Refused("the field is called max_tokens on this route"),
    "top_logprobs": Refused("on this route logprobs is the number of alternatives", (0,)),
    "continue_final_message": Refused("only /v1/chat/completions has it", (False,)),
    "add_generation_prompt": Refused("only /v1/chat/completions has it"),
    "chat_template_kwargs": Refused("only /v1/chat/completions has it", ({},)),
    "tools": Refused("only /v1/chat/completions has it", ([],)),
    "tool_choice": Refused("only /v1/chat/completions has it", ("none", "auto")),
    "add_special_tokens": Refused("send token ids as the prompt to leave them out", (True,)),
}

# Known fields that change no token of the answer: accepted, and logged once by name like unknown ones. name -> why.
WITHOUT_EFFECT: dict[str, str] = {
    "user": "requests are not told apart by user",
    "safety_identifier": "requests are not told apart by user",
    "store": "answers are not stored",
    "metadata": "answers are not stored, so there is nothing to attach it to",
    "service_tier": "there is one tier",
    "prompt_cache_key": "common prefixes are cached by themselves",
    "prompt_cache_retention": "a cached prefix stays until its place is needed",
    "cache_prompt": "common prefixes are always cached",
    "verbosity": "the models served here are not trained to heed it",
    "prediction": "it would save time only; speculative decoding is not there",
    "spaces_between_special_tokens": "a token's text is its own",
    "mm_processor_kwargs": "only text is accepted",
}

R = TypeVar("R", ChatRequest, CompletionRequest)
M = TypeVar("M", bound=BaseModel)


class FieldLog:
    """Remembers which fields without effect were logged already. Bounded, since clients choose the names."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def note(self, name: str) -> None:
        if name in self.seen or len(self.seen) >= MAX_LOGGED_FIELDS or len(name) > MAX_ID_LENGTH:
            return
        self.seen.add(name)
        log.info("request field %r has no effect on this server; it is accepted and ignored", name)


def parse_request(kind: type[R], body: dict[str, Any], fields: FieldLog) -> R:
    """body -> a request with right types. Raises APIError 400 naming the field at fault."""
    refused = REFUSED | (REFUSED_IN_CHAT if kind is ChatRequest else REFUSED_IN_COMPLETIONS)
    request = parse_fields(kind, body, refused, fields)
    if request.stream_options is not None and not request.stream:
        raise invalid_request("stream_options is only allowed together with stream: true.", "stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise invalid_request("prompt_logprobs are not part of a stream; ask without stream.", "prompt_logprobs")
    return request


def parse_fields(kind: type[M], body: dict[str, Any], refused: Mapping[str, Refused], fields: FieldLog) -> M:
    """The same for any route, by its own table of refused fields."""
    check_names(kind, body, refused, fields)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise as_invalid_request(error, kind) from None


def check_names(
    kind: type[BaseModel], given: Mapping[str, Any], refused: Mapping[str, Refused], fields: FieldLog, where: str = ""
) -> None:
    """Fields that kind does not have: refused or logged. where: the path to them, as in "sampling_params."."""
    for name, value in given.items():
        if name in kind.model_fields:
            continue
        rule = refused.get(name)
        if rule is None:
            fields.note(where + name)
        else:
            refuse(rule, where + name, value)


def refuse(rule: Refused, name: str, value: Any) -> None:
    """Raises APIError 400 unless the value asks for nothing."""
    if value is not None and not is_neutral(value, rule.neutral):
        raise unsupported(f"{name!r} is not supported: {rule.why}.", name)


def is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Equality that keeps true apart from 1."""
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral)


def as_invalid_request(error: ValidationError, kind: type[BaseModel]) -> Exception:
    """The first thing pydantic found, in words that name the field as the client wrote it."""
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0])
    if first["type"] == "missing":
        return invalid_request(f"You must provide the field {name!r}.", name, "missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    if name in ("prompt", "input", "stop") and not first["type"].startswith("value_error"):
        allowed = "a string or an array of strings"
        message = allowed + ("" if name == "stop" else ", or token ids as [int] or [[int]]") + " is expected"
        return invalid_request(f"Invalid type for {name!r}: {message}.", name, "invalid_type")
    where = ".".join(str(part) for part in first["loc"] if not _is_union_branch(part))
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    given = first.get("input")
    shown = f" (given: {given!r})" if isinstance(given, int | float | str) and len(str(given)) <= 64 else ""
    return invalid_request(f"Invalid value for {where!r}: {message}{shown}.", where, code)


def _is_union_branch(part: int | str) -> bool:
    """pydantic names the branch of a union in the path, as in 'list[str]', 'constrained-str' or a model's name."""
    if isinstance(part, int):
        return False
    return "[" in part or "-" in part or part[:1].isupper() or part in ("str", "int", "float", "bool")
