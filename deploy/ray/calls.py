"""What goes between the ingress and a replica."""

from collections.abc import Iterable, Set
from dataclasses import dataclass

# Headers about one connection (RFC 9110, section 7.6.1), and those that each hop writes itself.
OF_ONE_HOP = frozenset(
    (
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"),
        *("transfer-encoding", "upgrade", "host", "content-length", "expect", "date", "server"),
    )
)
REPLICA_HEADER = "x-jaxserve-replica"


@dataclass(frozen=True)
class Call:
    """One HTTP request. prefix: what the router sends it by, if anything."""

    method: str
    target: str  # path and query, still percent-encoded
    headers: tuple[tuple[str, str], ...]
    body: bytes
    prefix: str | None = None


@dataclass(frozen=True)
class Head:
    """What a reply begins with; its bytes follow."""

    status: int
    headers: tuple[tuple[str, str], ...]


def passed_on(headers: Iterable[tuple[str, str]], also: Set[str] = frozenset()) -> tuple[tuple[str, str], ...]:
    """Without those of one hop, except `also`."""
    return tuple((name.lower(), value) for name, value in headers if name.lower() not in OF_ONE_HOP - also)
