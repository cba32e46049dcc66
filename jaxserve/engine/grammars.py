"""Matchers for constrained requests, made beside the loop: a grammar that takes long delays its own request only."""

import json
import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.types import Request

if TYPE_CHECKING:
    from jaxserve.scheduling.grammar import Matcher, Vocabulary

logger = logging.getLogger(__name__)

NUM_REMEMBERED = 128  # compiled grammars


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the loop finds in its inbox for a request that waited: its matcher, or None where that was not to be had."""

    request: Request
    matcher: "Matcher | None"


class Grammars:
    """One thread that makes the vocabulary first and then compiles; all else belongs to the loop's thread."""

    def __init__(self, load: "Callable[[], Vocabulary]", put: Callable[[Prepared], None]) -> None:
        """put: the loop's inbox, called from the thread."""
        self._put = put
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._load = load
        self._loading: Future[Vocabulary] | None = None
        self._known: OrderedDict[str, Future[Matcher]] = OrderedDict()

    def load(self) -> "Future[Vocabulary]":
        """Begin to make the vocabulary, unless that was done; its error goes to the requests that need it."""
        if self._loading is None:
            self._loading = self._pool.submit(self._load)
        return self._loading

    def prepare(self, request: Request) -> "Matcher | None":
        """A matcher that is there at once, or None: then Prepared arrives later."""
        grammar = request.grammar
        assert grammar is not None
        future = self._known.get(grammar)
        if future is None:
            vocabulary = self.load()
            future = self._known[grammar] = self._pool.submit(lambda: vocabulary.result().compile(grammar))
            if len(self._known) > NUM_REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(grammar)
        if future.done() and future.exception() is None:
            return future.result().copy()
        future.add_done_callback(lambda done: self._put(Prepared(request, _matcher(done))))
        return None


def _matcher(done: "Future[Matcher]") -> "Matcher | None":
    error = done.exception()
    if error is not None:
        logger.error("a grammar cannot be followed: %s", str(error).partition("\n")[0])
        return None
    return done.result().copy()


def load_vocabulary(folder: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> "Vocabulary":
    """folder: of tokenizer.json. The end of text is eos_token_ids and what tokenizer_config.json adds to them."""
    from jaxserve.scheduling.grammar import Vocabulary

    text = (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")
    added: dict[str, int] = {token["content"]: token["id"] for token in json.loads(text).get("added_tokens") or ()}
    named = _eos_text(Path(folder) / "tokenizer_config.json")
    ids = dict.fromkeys((*eos_token_ids, *((added[named],) if named in added else ())))
    return Vocabulary(text, vocab_size, tuple(ids))


def _eos_text(path: Path) -> str | None:
    if not path.is_file():
        return None
    token: Any = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    return token.get("content") if isinstance(token, dict) else token
