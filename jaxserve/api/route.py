"""One way through a route that generates: the same three functions serve a client and a line of a batch."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from fastapi import Request
from starlette.responses import Response

from jaxserve.api.http import begin_stream, json_response, read_json, unless_disconnected
from jaxserve.api.serving import Serving


class Job(Protocol):
    """A request that was checked and is ready to run."""

    @property
    def stream(self) -> bool: ...


J = TypeVar("J", bound=Job)


@dataclass(frozen=True, slots=True)
class Route(Generic[J]):
    """begin(serving, body, priority) checks everything, and raises every error that is the client's; whole() answers
    in one piece; events() as server-sent events, the errors of a stream that has begun included.
    """

    begin: Callable[[Serving, dict[str, Any], int], Awaitable[J]]
    whole: Callable[[Serving, J], Awaitable[Any]]
    events: Callable[[Serving, J], AsyncGenerator[bytes, None]] | None = None  # None: no request of it streams

    async def respond(self, serving: Serving, http: Request) -> Response:
        """Every error is raised before the first byte of the reply."""
        body = await read_json(http, serving.config.max_body_size)
        job = await self.begin(serving, body, 0)
        if job.stream and self.events is not None:
            return await begin_stream(http, self.events(serving, job))
        return json_response(await unless_disconnected(http, self.whole(serving, job)))

    async def answer(self, serving: Serving, body: dict[str, Any], priority: int = 0) -> dict[str, Any]:
        """The whole reply to a request that does not stream, for callers without an HTTP connection (batches).

        priority: 0 interactive, 1 batch. Raises APIError and what errors.as_api_error knows.
        """
        return await self.whole(serving, await self.begin(serving, body, priority))
