"""What every route needs: the engine's client, the tokenizer once it is loaded, and whether the server can answer
yet."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxserve.api.errors import APIError, invalid_request, not_found, unavailable
from jaxserve.api.metrics import Metrics
from jaxserve.api.schema import FieldLog
from jaxserve.client import EngineClient
from jaxserve.config import ServerConfig
from jaxserve.store import Store
from jaxserve.text.dialect import Dialect, dialect_of
from jaxserve.text.grammar import GrammarChecker
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import Progress, Ready

if TYPE_CHECKING:
    from jaxserve.api.batch_worker import BatchWorker


@dataclass
class Serving:
    """The front end's state.

    launch fills in tokenizer and progress while the server starts, and stopping when it ends.
    """

    client: EngineClient
    config: ServerConfig
    metrics: Metrics
    tokenizer: Tokenizer | None = None
    progress: Progress | None = None  # of the stages before the engine speaks; then client.progress counts
    failure: str | None = None  # of the start, before there was an engine
    stopping: bool = False
    store: Store | None = None  # of files and batches
    matryoshka: tuple[int, ...] | None = None  # sizes a vector may be cut to; (): any; None: the model declares none
    store_missing: str = "this server was started without a place for them"
    batch_worker: "BatchWorker | None" = None
    created: int = field(default_factory=lambda: int(time.time()))
    fields: FieldLog = field(default_factory=FieldLog)
    _checker: GrammarChecker | None = None
    clock: Callable[[], float] = time.time
    _dialect: Dialect | None = None

    def __post_init__(self) -> None:
        seed = self.config.random_seed
        self._seeds = random.SystemRandom() if seed is None else random.Random(seed)

    def draw_seed(self) -> int:
        """64 bits for a request that brings no seed."""
        return self._seeds.getrandbits(64)

    @property
    def model_names(self) -> tuple[str, ...]:
        return self.config.served_model_names

    def stage(self) -> dict[str, Any] | None:
        """None when requests can be served, else what stands in the way: {status, stage, done, total, message}."""
        failed = self.failure or (self.client.failure.message if self.client.failure else None)
        if failed is not None:
            return {"status": "failed", "stage": "failed", "done": 0, "total": 0, "message": failed}
        if self.stopping:
            return {"status": "stopping", "stage": "stopping", "done": 0, "total": 0, "message": "shutting down"}
        if self.client.ready is not None and self.tokenizer is not None:
            return None
        at = self.client.progress or self.progress or Progress("load", 0, 0, "starting")
        return {"status": "starting", "stage": at.stage, "done": at.done, "total": at.total, "message": at.message}

    def require_ready(self) -> tuple[Tokenizer, Ready]:
        """Raises APIError 503 with {stage, done, total} until the engine has compiled everything, and after it died."""
        stage = self.stage()
        if stage is not None:
            message = f"The server cannot answer now: {stage['status']} ({stage['stage']}: {stage['message']})."
            raise unavailable(message, f"server_{stage['status']}", stage)
        assert self.tokenizer is not None and self.client.ready is not None
        return self.tokenizer, self.client.ready

    def dialect(self) -> Dialect:
        """How the model speaks, found out once. Raises APIError 503 until the tokenizer is loaded."""
        tokenizer, _ = self.require_ready()
        if self._dialect is None:
            self._dialect = dialect_of(tokenizer, self.config.tool_call_parser, self.config.reasoning_parser)
        return self._dialect

    @property
    def grammar_checker(self) -> GrammarChecker:
        """It remembers the grammars it found sound. Raises APIError 503 as require_ready."""
        tokenizer, _ = self.require_ready()
        if self._checker is None:
            self._checker = GrammarChecker(tokenizer)
        return self._checker

    @property
    def generates(self) -> bool:
        """False where only embeddings are served. Ready or not: until then, what the flags say."""
        ready = self.client.ready
        return not self.config.embedding_only and (ready is None or ready.generates)

    def require_generating(self) -> None:
        """Raises APIError 400 where only embeddings are served."""
        if not self.generates:
            why = "it was started with --is-embedding" if self.config.embedding_only else "its model is an encoder"
            message = f"This server generates no text, since {why}; POST /v1/embeddings is what it serves."
            raise invalid_request(message, "model", "model_not_generative")

    def require_store(self) -> Store:
        """Raises APIError 503 when this server keeps nothing."""
        if self.store is None:
            message = f"Files, batches and stored responses are not available: {self.store_missing}."
            raise unavailable(message, "storage_unavailable")
        return self.store

    def check_model(self, name: str) -> None:
        """Raises APIError 404 for a name that is not served."""
        if name in self.model_names or self.config.allow_any_model:
            return
        raise model_not_found(name, self.model_names)


def model_not_found(name: str, served: tuple[str, ...]) -> APIError:
    names = ", ".join(repr(item) for item in served)
    message = (
        f"The model {name[:200]!r} does not exist. This server serves {names}; "
        "see --served-model-name and --allow-any-model."
    )
    return not_found(message, "model", "model_not_found")
