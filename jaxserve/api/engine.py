"""GET /v1/engine: the scheduler at work, for people who watch. Counts, times and pages; nothing of any text."""

import asyncio
import base64
from collections.abc import AsyncGenerator, Iterable
from dataclasses import asdict
from typing import Any

from fastapi import Request
from starlette.responses import Response

from jaxserve.api.errors import invalid_request
from jaxserve.api.generation import with_errors
from jaxserve.api.http import begin_stream, event, json_response
from jaxserve.api.paging import integer_query
from jaxserve.api.serving import Serving
from jaxserve.types import BucketView, Ready, Snapshot, StepView

INTERVAL_MS = (100, 500, 10_000)  # least, default, most
STOP_POLL = 0.25  # seconds in which a stream notices that the server ends


async def get_engine(serving: Serving, http: Request) -> Response:
    """What runs and waits, every page of the KV cache, the latest steps, and the use of each compiled shape.

    ?stream=true sends one such object as an event every ?interval_ms (100 to 10000, default 500) until the client
    leaves. Whoever else watches shares the same snapshots, so that the engine makes at most five a second.
    """
    serving.require_ready()
    wanted = http.query_params.get("stream", "false")
    if wanted not in ("true", "false"):
        raise invalid_request(f"Invalid value for 'stream': '{wanted[:100]}' was given; true or false.", "stream")
    least, default, most = INTERVAL_MS
    interval = integer_query(http, "interval_ms", default, least, most) / 1000
    if wanted == "true":
        return await begin_stream(http, with_errors(_events(serving, interval)))
    return json_response(await _view(serving))


async def _events(serving: Serving, interval: float) -> AsyncGenerator[bytes, None]:
    """Until the server ends or the reader does."""
    while not serving.stopping:
        yield event(await _view(serving))
        waited = 0.0
        while waited < interval and not serving.stopping:
            pause = min(STOP_POLL, interval - waited)
            await asyncio.sleep(pause)
            waited += pause


async def _view(serving: Serving) -> dict[str, Any]:
    _, ready = serving.require_ready()
    snapshot = await serving.client.snapshot()
    stats = asdict(snapshot.stats) | {"tokens_per_second": round(serving.metrics.throughput.value(), 2)}
    return {
        "object": "engine",
        "model": serving.model_names[0],
        "engine": asdict(ready),
        "now": round(snapshot.now, 4),
        "stats": stats,
        "requests": [view._asdict() for view in snapshot.requests],
        "pages": _pages(snapshot, ready),
        "buckets": [bucket._asdict() | {"padding_tokens": _padding(bucket)} for bucket in snapshot.buckets],
        "steps": _columns(StepView._fields, snapshot.steps),
        "timeline": [
            {
                "id": line.id,
                "priority": line.priority,
                "marks": [[state, round(at, 4)] for state, at in line.marks],
                "ended": None if line.ended is None else round(line.ended, 4),
                "finish_reason": line.reason,
            }
            for line in snapshot.lifelines
        ],
    }


def _pages(snapshot: Snapshot, ready: Ready) -> dict[str, Any]:
    stats = snapshot.stats
    return {
        "page_size": ready.page_size,
        "num_pages": stats.num_pages,
        "held": stats.num_held_pages,
        "cached": stats.num_cached_pages,
        "free": stats.num_pages - stats.num_held_pages - stats.num_cached_pages,
        "map": base64.b64encode(snapshot.page_states).decode(),
    }


def _padding(bucket: BucketView) -> int:
    return bucket.steps * (bucket.decode_rows + bucket.prefill_tokens) - bucket.tokens


def _columns(names: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> dict[str, list[Any]]:
    """A list for each name: a quarter of the bytes of a list of objects."""
    columns = list(zip(*rows, strict=True))
    rounded = [[round(v, 4) if isinstance(v, float) else v for v in column] for column in columns]
    return dict(zip(names, rounded, strict=True)) if rounded else {name: [] for name in names}
