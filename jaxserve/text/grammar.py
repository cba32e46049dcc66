"""What a client asks of the form of an answer -> a grammar of llguidance, checked, as Request.grammar carries it.

The builders (json_schema, regex, choice, lark, ebnf) are pure and cheap; GrammarChecker.check compiles what they made.
grammar_of does both for the fields of a request. llguidance takes 0.2 s to import, so the first use imports it.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from jaxserve.text.ebnf import EbnfError, ebnf_to_lark
from jaxserve.text.finite import has_finite_instance
from jaxserve.text.params import ParameterError

if TYPE_CHECKING:
    from jaxserve.text.tokenizer import Tokenizer

MAX_GRAMMAR_LENGTH = 256 * 1024  # characters
MAX_CHOICES = 10_000
MAX_SHOWN = 400  # characters of llguidance's message
MAX_SYMBOLS = 20_000  # of llguidance's productions, about a schema of 1,500 optional properties; a mask takes 20 ms
NUM_REMEMBERED = 64  # grammars that were checked lately

# One space may follow a separator and no other whitespace is allowed: small models lose themselves in free whitespace.
JSON_OPTIONS = {"whitespace_flexible": False, "key_separator": ": ?", "item_separator": ", ?", "lenient": False}
COMPACT_OPTIONS = {"whitespace_flexible": False, "key_separator": ":", "item_separator": ",", "lenient": False}

FIELDS = (
    "response_format",  # OpenAI
    "json_schema",  # SGLang, as are regex and ebnf
    "regex",
    "ebnf",
    "structured_outputs",  # vLLM, as are the guided_ ones, which are its older names
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "grammar",  # llama.cpp
)


def grammar_of(fields: Mapping[str, Any], checker: "GrammarChecker") -> str | None:
    """The fields of a request, by the names of FIELDS -> its grammar, or None where it asks for none.

    Raises ParameterError, whose param is the field at fault.
    """
    built = {name: grammar for name in FIELDS if (grammar := _field(name, fields.get(name))) is not None}
    if not built:
        return None
    first, *others = built
    if others:
        raise ParameterError(
            f"{first} and {others[0]} both say what the answer looks like; send one of them", others[0]
        )
    checker.check(built[first], first)
    return built[first]


def json_schema(schema: Any, param: str = "json_schema", *, compact: bool = False) -> str:
    """A JSON Schema, as an object or as its text, -> the grammar of its instances, keys in the order of properties.

    compact: no space after separators. Raises ParameterError.
    """
    if isinstance(schema, str):
        _check_length(schema, param)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ParameterError(f"{param} is a string that holds no JSON: {error}", param) from None
    if not isinstance(schema, Mapping):
        raise ParameterError(f"{param} holds {_kind(schema)}; a JSON Schema is an object", param)
    try:
        finite = has_finite_instance(schema)
    except RecursionError:
        raise ParameterError(f"{param} is nested too deeply", param) from None
    if not finite:
        raise ParameterError(f"{param} cannot be enforced: every value that satisfies it is endless", param)
    options = COMPACT_OPTIONS if compact else JSON_OPTIONS
    # x-guidance would let a schema switch checks off.
    plain = {key: value for key, value in schema.items() if key != "x-guidance"}
    try:
        text = json.dumps({**plain, "x-guidance": options})
    except RecursionError:
        raise ParameterError(f"{param} is nested too deeply", param) from None
    except (TypeError, ValueError) as error:
        raise ParameterError(f"{param} cannot be written as JSON: {error}", param) from None
    _check_length(text, param)
    return f'{{"grammars": [{{"json_schema": {text}}}]}}'


def json_object(param: str = "response_format") -> str:
    """Any JSON object."""
    return json_schema({"type": "object"}, param)


def regex(pattern: Any, param: str = "regex") -> str:
    """A regular expression (Rust's syntax) that the whole answer matches. Raises ParameterError."""
    return json.dumps({"grammars": [{"lark_grammar": f"start: {_regex(_text(pattern, param))}\n"}]})


def choice(options: Any, param: str = "guided_choice") -> str:
    """One of these texts. Raises ParameterError."""
    if not isinstance(options, Sequence) or isinstance(options, str) or not options:
        raise ParameterError(f"{param} is {_kind(options)}; a list of strings, one at least, is expected", param)
    if len(options) > MAX_CHOICES:
        raise ParameterError(f"{param} has {len(options)} choices; at most {MAX_CHOICES} are allowed", param)
    texts = [_text(option, param) for option in options]
    if sum(map(len, texts)) > MAX_GRAMMAR_LENGTH:
        _check_length("".join(texts), param)
    return lark("start: C\nC: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts) + "\n", param)


def lark(text: Any, param: str = "grammar") -> str:
    """A grammar in llguidance's Lark, its start rule called start. Raises ParameterError."""
    return json.dumps({"grammars": [{"lark_grammar": _text(text, param)}]})


def ebnf(text: Any, param: str = "ebnf") -> str:
    """A grammar in GBNF or xgrammar's EBNF, its start rule called root. Raises ParameterError."""
    try:
        return lark(ebnf_to_lark(_text(text, param)), param)
    except EbnfError as error:
        raise ParameterError(f"{param} is no grammar: {error}", param) from None


def either_grammar(text: Any, param: str = "grammar") -> str:
    """EBNF where rules are written with ::=, else Lark. Raises ParameterError."""
    is_ebnf = re.search(r"^\s*[A-Za-z0-9_-]+\s*::=", _text(text, param), re.MULTILINE)
    return ebnf(text, param) if is_ebnf else lark(text, param)


class GrammarChecker:
    """Compiles grammars over a vocabulary of single bytes and the model's special tokens: 4 ms to make, and what it
    accepts the engine can compile. Safe to use from several threads."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._special_tokens = [tokenizer.token_text(id_) for id_ in sorted(tokenizer.special_ids)]
        self._vocab_size = tokenizer.vocab_size
        self._lock = Lock()
        self._compiler: Any = None
        self._sound: OrderedDict[str, None] = OrderedDict()

    def check(self, grammar: str, param: str) -> None:
        """Raises ParameterError where llguidance cannot enforce the grammar, or nothing is a sentence of it."""
        with self._lock:
            if grammar in self._sound:
                self._sound.move_to_end(grammar)
                return
        problem = self._problem(grammar)
        if problem is not None:
            raise ParameterError(f"{param} cannot be enforced: {problem}", param)
        with self._lock:
            self._sound[grammar] = None
            if len(self._sound) > NUM_REMEMBERED:
                self._sound.popitem(last=False)

    def knows(self, grammar: str) -> bool:
        """True when check would answer at once."""
        with self._lock:
            return grammar in self._sound

    def _problem(self, grammar: str) -> str | None:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_grammar_size=MAX_SYMBOLS)
        try:
            matcher = LLMatcher(self._tokenizer(), grammar, log_level=0, limits=limits)
        except ValueError as error:  # half a surrogate pair
            return str(error)
        if matcher.is_error():
            return _readable(matcher.get_error())
        matcher.compute_bitmask()
        if matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()):
            return "no answer at all would satisfy it"
        return None

    def _tokenizer(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._lock:
            if self._compiler is None:
                wrapper = TokenizerWrapper(_Bytes(self._special_tokens))
                self._compiler = LLTokenizer(wrapper, n_vocab=max(self._vocab_size, len(wrapper.tokens)))
            return self._compiler


class _Bytes:
    """What llguidance asks of a tokenizer; token 256 ends a text."""

    eos_token_id = 256
    bos_token_id = None

    def __init__(self, special_tokens: list[str]) -> None:
        self.tokens = [bytes([byte]) for byte in range(256)] + [b"<|end of text|>"]
        self.tokens += [text.encode() for text in special_tokens]
        self.special_token_ids = list(range(256, len(self.tokens)))

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _field(name: str, value: Any) -> str | None:
    """One field of FIELDS -> its grammar; None where it asks for nothing."""
    if value is None or (name in ("grammar", "guided_grammar", "regex", "ebnf") and value == ""):
        return None
    match name:
        case "response_format":
            return _response_format(value)
        case "structured_outputs":
            return _structured_outputs(value)
        case "json_schema" | "guided_json":
            return json_schema(value, name)
        case "regex" | "guided_regex":
            return regex(value, name)
        case "guided_choice":
            return choice(value, name)
        case "ebnf":
            return ebnf(value, name)
        case _:
            return either_grammar(value, name)


def _response_format(value: Any) -> str | None:
    param = "response_format"
    if not isinstance(value, Mapping):
        raise ParameterError(f"{param} is {_kind(value)}; an object with a type is expected", param)
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            schema = value.get("schema")  # llama.cpp's
            return json_object(param) if schema is None else json_schema(schema, f"{param}.schema")
        case "json_schema":
            if "json_schema" not in value and "schema" in value:  # llama.cpp's
                return json_schema(value["schema"], f"{param}.schema")
            return _named_schema(value.get("json_schema"), f"{param}.json_schema")
        case other:
            allowed = "text, json_object and json_schema are allowed"
            raise ParameterError(f"{param}.type is {_shown(other)}; {allowed}", f"{param}.type")


def _named_schema(value: Any, param: str) -> str:
    if not isinstance(value, Mapping) or value.get("schema") is None:
        raise ParameterError(f"{param} is {_kind(value)}; an object with a name and a schema is expected", param)
    for key, kind in (("name", str), ("description", str), ("strict", bool)):
        if value.get(key) is not None and not isinstance(value[key], kind):
            raise ParameterError(f"{param}.{key} is {_kind(value[key])}; {kind.__name__} is expected", f"{param}.{key}")
    return json_schema(value["schema"], f"{param}.schema")


def _structured_outputs(value: Any) -> str | None:
    param = "structured_outputs"
    if not isinstance(value, Mapping):
        raise ParameterError(f"{param} is {_kind(value)}; an object is expected", param)
    compact = value.get("disable_any_whitespace") or False
    if not isinstance(compact, bool):
        raise ParameterError(f"{param}.disable_any_whitespace is {_kind(compact)}; a boolean is expected", param)
    given = {key: item for key, item in value.items() if item not in (None, False) and key != "disable_any_whitespace"}
    builders = {
        "json": lambda item, name: json_schema(item, name, compact=compact),
        "json_object": lambda item, name: json_schema({"type": "object"}, name, compact=compact),
        "regex": regex,
        "choice": choice,
        "grammar": either_grammar,
    }
    unknown = sorted(set(given) - set(builders))
    if unknown:
        allowed = f"{', '.join(builders)} and disable_any_whitespace are"
        raise ParameterError(f"{param}.{unknown[0]} is not supported; {allowed}", f"{param}.{unknown[0]}")
    if len(given) > 1:
        raise ParameterError(f"{param} holds {' and '.join(given)}; one of them is allowed", param)
    for key, item in given.items():
        return builders[key](item, f"{param}.{key}")
    return None


def _regex(pattern: str) -> str:
    """pattern between the slashes that Lark writes around it."""
    escaped = re.sub(
        r"\\.|/|\n|\r", lambda m: {"/": "\\/", "\n": "\\n", "\r": "\\r"}.get(m[0], m[0]), pattern, flags=re.S
    )
    return f"/{escaped}/"


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str) or not value:
        raise ParameterError(f"{param} is {_kind(value)}; a string that is not empty is expected", param)
    _check_length(value, param)
    return value


def _check_length(text: str, param: str) -> None:
    if len(text) > MAX_GRAMMAR_LENGTH:
        raise ParameterError(f"{param} has {len(text)} characters; at most {MAX_GRAMMAR_LENGTH} are allowed", param)


def _readable(message: str) -> str:
    """llguidance's message on one line, without its dumps of state, and cut."""
    message = re.sub(r"^at \d+\(\d+\): ", "", message.partition("\n<state>")[0])
    message = " ".join(message.partition("\n   1 |")[0].split())
    unsupported = re.match(r"Unimplemented keys: \[(.*)\]$", message)
    if unsupported:
        return f"JSON Schema's {unsupported[1]} is not supported; leave it out or say it another way"
    return message[:MAX_SHOWN] + ("…" if len(message) > MAX_SHOWN else "")


def _kind(value: Any) -> str:
    if isinstance(value, str | int | float | bool) or value is None:
        return _shown(value)
    return "an array" if isinstance(value, Sequence) else "an object"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 64 else text[:61] + "..."
