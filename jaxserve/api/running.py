"""For whom a request is computed: the ids by which /abort_request finds it.

A context variable, because the ids come from places that do not know of each other (the header at the door, the reply's
id in the route) and are needed where requests enter the engine. asyncio gives every HTTP request a context of its own;
batches have none, and so nobody to end them by id.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Caller:
    """One HTTP request."""

    ids: list[str] = field(default_factory=list)  # the x-request-id first, then the reply's
    ended: bool = False  # by /abort_request


_current: ContextVar[Caller | None] = ContextVar("caller", default=None)


def begin(request_id: str) -> None:
    """Around everything that follows in this task."""
    _current.set(Caller([request_id]))


def also_known_as(*ids: str) -> None:
    """The ids of the reply, before anything is submitted."""
    caller = _current.get()
    if caller is not None:
        caller.ids += [each for each in ids if each not in caller.ids]


def current() -> Caller | None:
    """None outside of HTTP requests."""
    return _current.get()
