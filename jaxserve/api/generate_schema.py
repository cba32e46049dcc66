"""What a client may send to /generate. Lists have one entry for each prompt; a single value is for all of them."""

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxserve.api.errors import invalid_request
from jaxserve.api.schema import (
    MAX_CHOICES,
    MAX_ID_LENGTH,
    MAX_STOP_LENGTH,
    REFUSED,
    FieldLog,
    Refused,
    TokenId,
    as_invalid_request,
    check_names,
)

MAX_NATIVE_STOPS = 64
T = TypeVar("T")
Rid = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)]
TopLogprobs = Annotated[int, Field(ge=0, le=20)]
StartLen = Annotated[int, Field(ge=-1)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class NativeSampling(BaseModel):
    """sampling_params of /generate."""

    model_config = ConfigDict(strict=True, extra="ignore")

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    sampling_seed: int | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_NATIVE_STOPS)] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    json_schema: Any = None  # these three: text.grammar knows their types; one of them at most
    regex: Any = None
    ebnf: Any = None

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """What is asked of one prompt."""

    prompt: str | list[int]
    sampling: NativeSampling
    return_logprob: bool
    logprob_start_len: int
    top_logprobs_num: int
    return_text_in_logprobs: bool


class GenerateRequest(BaseModel):
    """POST /generate."""

    model_config = ConfigDict(strict=True, extra="ignore")

    text: str | list[str] | None = None
    input_ids: list[TokenId] | list[list[TokenId]] | None = None
    sampling_params: NativeSampling | list[NativeSampling] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: StartLen | list[StartLen] | None = None
    top_logprobs_num: TopLogprobs | list[TopLogprobs] | None = None
    return_text_in_logprobs: bool | None = None
    rid: Rid | list[Rid] | None = None
    stream: bool | None = None

    @property
    def is_batch(self) -> bool:
        if self.text is not None:
            return isinstance(self.text, list)
        return bool(self.input_ids) and isinstance((self.input_ids or [0])[0], list)

    def rids(self) -> list[str]:
        return [self.rid] if isinstance(self.rid, str) else list(self.rid or ())

    def prompts(self) -> list[PromptRequest]:
        """Raises APIError 400 where lists do not fit each other."""
        given: Any = self.text if self.text is not None else self.input_ids
        prompts: list[Any] = given if self.is_batch else [given]
        count = len(prompts)
        if isinstance(self.rid, list) and (len(self.rid) != count or len(set(self.rid)) != count):
            raise invalid_request(f"'rid' must hold {count} different ids, one for each prompt.", "rid")
        sampling = self._each("sampling_params", self.sampling_params, NativeSampling(), count)
        logprob = self._each("return_logprob", self.return_logprob, False, count)
        starts = self._each("logprob_start_len", self.logprob_start_len, -1, count)
        tops = self._each("top_logprobs_num", self.top_logprobs_num, 0, count)
        texts = bool(self.return_text_in_logprobs)
        return [PromptRequest(*row, texts) for row in zip(prompts, sampling, logprob, starts, tops, strict=True)]

    def _each(self, name: str, value: Any, default: T, count: int) -> list[T]:
        if value is None:
            return [default] * count
        if not isinstance(value, list):
            return [value] * count
        if not self.is_batch or len(value) != count:
            message = f"'{name}' has {len(value)} entries for {count} prompts; send one for each, or one value for all."
            raise invalid_request(message, name)
        return value


_MEDIA = Refused("only text and token ids are accepted", ([],))
_CODE = Refused("custom code is not run by this server", ("", {}))

REFUSED_IN_GENERATE: dict[str, Refused] = {
    "image_data": _MEDIA,
    "video_data": _MEDIA,
    "audio_data": _MEDIA,
    "input_embeds": _MEDIA,
    "token_ids_logprob": Refused("use top_logprobs_num", ([],)),
    "session_params": Refused("sessions are not supported; common prefixes are cached by themselves"),
    "lora_path": Refused("adapters are not supported yet", ("",)),
    "custom_logit_processor": _CODE,
    "return_hidden_states": Refused("hidden states are not part of the reply", (False,)),
    "priority": Refused("priorities per request are not supported", (0,)),
    "extra_key": Refused("separate prefix caches are not supported", ("",)),
    "cache_salt": Refused("separate prefix caches are not supported", ("",)),
}
REFUSED_IN_SAMPLING: dict[str, Refused] = {
    "max_tokens": Refused("the field is called max_new_tokens on this route"),
    "min_tokens": Refused("the field is called min_new_tokens on this route", (0,)),
    "include_stop_str_in_output": Refused("the field is called no_stop_trim on this route", (False,)),
    "stop_regex": Refused("stop takes strings, not patterns", ("", [])),
    "custom_params": _CODE,
    "beam_width": Refused("beam search is not supported", (0, 1)),
    "structural_tag": REFUSED["structural_tag"],
}


def parse_generate(body: dict[str, Any], fields: FieldLog) -> GenerateRequest:
    """body -> a request with right types. Raises APIError 400 naming the field at fault."""
    check_names(GenerateRequest, body, REFUSED_IN_GENERATE, fields)
    sampling = body.get("sampling_params")
    for each in sampling if isinstance(sampling, list) else [sampling]:
        if isinstance(each, dict):
            check_names(NativeSampling, each, REFUSED_IN_SAMPLING, fields, "sampling_params.")
    try:
        request = GenerateRequest.model_validate(body)
    except ValidationError as error:
        raise as_invalid_request(error, GenerateRequest) from None
    if (request.text is None) == (request.input_ids is None):
        raise invalid_request("Send either 'text' or 'input_ids'.", "text", "missing_required_parameter")
    if request.text == [] or request.input_ids == []:
        name = "text" if request.input_ids is None else "input_ids"
        raise invalid_request(f"'{name}' must not be empty.", name, "empty_prompt")
    return request
