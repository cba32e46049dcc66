"""Tokenizer: a Hugging Face folder as one value: text <-> ids, exact bytes of tokens, chat template, sampling
defaults."""

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.pieces import Layout, layout_of

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from tokenizers import Tokenizer as Backend

_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
LONG_TEXT = 4096  # characters; longer ones are worth a thread
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TokenizerError(ValueError):
    """The folder holds no tokenizer that can be used, or the text cannot be tokenised."""


class Tokenizer:
    """Safe to use from several threads. ids are those of the model; ids past the vocabulary have no text."""

    def __init__(
        self,
        backend: "Backend",
        *,
        config: dict[str, Any] | None = None,
        model_config: dict[str, Any] | None = None,
        generation_config: dict[str, Any] | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        """config is tokenizer_config.json, model_config config.json; from_folder reads them."""
        config, model_config, generation_config = config or {}, model_config or {}, generation_config or {}
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.chat_template = chat_template
        self.layout: Layout | None = layout_of(json.loads(backend.to_str())["decoder"])
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(id_ for id_, token in added.items() if token.special)
        keeps_all = self.layout is not None and self.layout.byte_level and backend.normalizer is None
        keeps_all = keeps_all and not any(token.lstrip or token.rstrip for token in added.values())
        self._longest = max(map(len, backend.get_vocab(with_added_tokens=True)), default=0) if keeps_all else 0
        self.bos_token_id = self._role_id(config, model_config, "bos")
        self.eos_token_id = self._role_id(config, model_config, "eos")
        eos = (
            *_ids(model_config.get("eos_token_id")),
            *_ids(generation_config.get("eos_token_id")),
            *_ids(self.eos_token_id),
        )
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(eos))
        self.sampling_defaults: dict[str, float] = _numbers(generation_config, _SAMPLING_FIELDS)
        self._add_bos = config.get("add_bos_token")
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, path: str, *, chat_template: str | None = None) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json, generation_config.json, config.json and the chat template.

        chat_template replaces the folder's own: the path of a Jinja file, or the template's text. Raises
        TokenizerError.
        """
        folder = Path(path)
        config = _read_json(folder / "tokenizer_config.json")
        special = {**_read_json(folder / "special_tokens_map.json"), **config}
        words = {role: text for role in _ROLES if (text := _token_text(special.get(role))) is not None}
        template = _find_template(folder, config, chat_template)
        return cls(
            _load_backend(folder),
            config={**config, **words},
            model_config=_read_json(folder / "config.json"),
            generation_config=_read_json(folder / "generation_config.json"),
            chat_template=None if template is None else ChatTemplate(template, special_tokens=words),
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """text -> ids. add_special_tokens: as the model's own (BOS); False after a chat template, which wrote them out.

        Raises TokenizerError for text with lone surrogates.
        """
        return self.encode_all([text], add_special_tokens=add_special_tokens)[0]

    def encode_all(self, texts: "Sequence[str]", *, add_special_tokens: bool) -> list[list[int]]:
        """The same for several texts. Releases the GIL where they are long together: call it in a thread then."""
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise TokenizerError(
                    f"character {error.start} is half of a surrogate pair (U+{ord(text[error.start]):04X}), which is "
                    "no character; send the whole pair or remove it"
                ) from None
        if sum(map(len, texts)) < LONG_TEXT:
            encoded = [self.backend.encode(text, add_special_tokens=add_special_tokens) for text in texts]
        else:  # encode() keeps the GIL: a second for each megabyte
            encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [self._begun(text, each.ids, add_special_tokens) for text, each in zip(texts, encoded, strict=True)]

    def fewest_tokens(self, text: str) -> int:
        """How many tokens the text has at least, as far as that is known without tokenising it."""
        return -(-len(text) // self._longest) if self._longest else 0

    def _begun(self, text: str, ids: list[int], add_special_tokens: bool) -> list[int]:
        """With or without BOS, as the model's configuration has it."""
        if add_special_tokens and self._add_bos is not None and self.bos_token_id is not None:
            has_bos = ids[:1] == [self.bos_token_id]
            if self._add_bos and not has_bos:
                return [self.bos_token_id, *ids]
            if not self._add_bos and has_bos and not text.startswith(self.token_text(self.bos_token_id)):
                return ids[1:]
        return ids

    def decode(self, ids: "Sequence[int]", *, skip_special_tokens: bool) -> str:
        """ids -> text; bytes that are no UTF-8 become U+FFFD. Ids without text are skipped."""
        from jaxserve.text.detokenizer import Detokenizer

        detokenizer = Detokenizer(self, skip_special_tokens)
        return detokenizer.push(ids) + detokenizer.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes this token adds to a text, wherever it stands; empty for an id without text."""
        piece = self._bytes.get(token_id)
        if piece is None:
            token = self.backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
            piece = b"" if token is None else (self.layout or Layout()).spell(token)
            self._bytes[token_id] = piece
        return piece

    def token_text(self, token_id: int) -> str:
        """token_bytes as text, U+FFFD for what is no UTF-8 by itself."""
        return self.token_bytes(token_id).decode(errors="replace")

    def _role_id(self, config: dict[str, Any], model_config: dict[str, Any], role: str) -> int | None:
        token = _token_text(config.get(f"{role}_token"))
        if token is not None:
            return self.backend.token_to_id(token)
        return next(iter(_ids(model_config.get(f"{role}_token_id"))), None)


def _load_backend(folder: Path) -> "Backend":
    path = folder / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer as Backend

        try:
            return Backend.from_file(str(path))
        except Exception as error:
            raise TokenizerError(f"{path} cannot be read: {error}") from None
    with quiet_transformers():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        try:
            loaded = AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError, ImportError) as error:
            raise TokenizerError(f"{folder} has no tokenizer.json, and no other tokenizer loads: {error}") from None
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise TokenizerError(f"{folder} has a {type(loaded).__name__}, which has no tokenizer.json form; add that file")
    return loaded.backend_tokenizer


@contextmanager
def quiet_transformers() -> "Generator[None]":
    """Import transformers in here: without torch it would greet with an advice that does not apply."""
    key = "TRANSFORMERS_VERBOSITY"
    before = os.environ.get(key)
    os.environ.setdefault(key, "error")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(key, None)


def _find_template(folder: Path, config: dict[str, Any], chosen: str | None) -> dict[str, str] | None:
    """-> {name: Jinja source}; "default" is among the names unless the model has only named ones."""
    if chosen is not None:
        return {"default": _read_template(chosen)}
    if (path := folder / "chat_template.jinja").is_file():
        return {"default": path.read_text(encoding="utf-8")}
    template = _read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):
        return {item["name"]: item["template"] for item in template} or None
    return {"default": template} if template else None


def _read_template(chosen: str) -> str:
    if "{" in chosen or "\n" in chosen:
        return chosen
    try:
        text = Path(chosen).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(
            f"chat template {chosen!r} cannot be read ({error}); give the path of a Jinja file"
        ) from None
    return text


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a {type(value).__name__}; a JSON object is expected")
    return value


def _token_text(token: Any) -> str | None:
    """A special token as it stands in tokenizer_config.json: its text, or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _numbers(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    return {name: values[name] for name in names if type(values.get(name)) in (int, float)}
