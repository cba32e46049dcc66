"""Routes for whoever runs the server: its load, its cache, and requests that shall end. SGLang's names."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import PlainTextResponse, Response

from jaxserve.api.errors import APIError, invalid_request, unavailable
from jaxserve.api.http import json_response, read_json
from jaxserve.api.running import Caller
from jaxserve.api.schema import Refused, as_invalid_request, refuse
from jaxserve.api.serving import Serving
from jaxserve.types import ProfileReport, StartProfile, StopProfile

MAX_PATH = 1000  # characters; file systems take 4096 bytes


async def flush_cache(serving: Serving, http: Request) -> Response:
    """Drops every cached prefix that no running request holds."""
    serving.require_ready()
    serving.client.flush_cache()
    return PlainTextResponse("Cache flushed.\n")


class AbortRequest(BaseModel):
    """Which requests to end."""

    model_config = ConfigDict(strict=True, extra="ignore")

    rid: str | None = Field(None, description="the id of a reply, an x-request-id, or the rid that a client sent")
    abort_all: bool | None = Field(None, description="every interactive request; batches are cancelled by their route")


async def abort_request(serving: Serving, http: Request) -> Response:
    """Ends running requests by id: {rid} or {abort_all: true} -> {"aborted": number of HTTP requests}.

    /generate answers with what it has and finish reason "abort"; other routes with the error `request_aborted`.
    """
    body = await read_json(http, serving.config.max_body_size)
    serving.require_ready()
    try:
        request = AbortRequest.model_validate(body)
    except ValidationError as error:
        raise as_invalid_request(error, AbortRequest) from None
    if not request.rid and not request.abort_all:
        raise invalid_request("Name a request by 'rid', or send abort_all: true.", "rid")
    ended = _end(serving, lambda caller: bool(request.abort_all) or request.rid in caller.ids)
    return json_response({"aborted": ended})


def _end(serving: Serving, chosen: Callable[[Caller], bool]) -> int:
    callers: set[Caller] = set()

    def is_chosen(owner: object) -> bool:
        if not isinstance(owner, Caller) or not chosen(owner):
            return False
        owner.ended = True
        callers.add(owner)
        return True

    serving.client.end_requests(is_chosen)
    return len(callers)


class ProfileRequest(BaseModel):
    """SGLang's fields; each may be left out, and so may the body."""

    model_config = ConfigDict(strict=True, extra="ignore")

    output_dir: str | None = Field(None, description="a folder below --profile-dir (default: named by the time)")
    num_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="steps after which it ends by itself")
    with_stack: bool | None = Field(None, description="Python's calls too")


_PROFILE_FIELDS = {
    "start_step": Refused("a profile starts at once"),
    "profile_by_stage": Refused("steps of all kinds are in one profile", (False,)),
}


async def start_profile(serving: Serving, http: Request) -> Response:
    """Begins a profile by jax.profiler, for TensorBoard or Perfetto: {"status", "folder"}; 409 while one is taken."""
    body = await read_json(http, serving.config.max_body_size, may_be_empty=True)
    serving.require_ready()
    for name, rule in _PROFILE_FIELDS.items():
        refuse(rule, name, body.get(name))
    try:
        request = ProfileRequest.model_validate(body)
    except ValidationError as error:
        raise as_invalid_request(error, ProfileRequest) from None
    folder = _profile_folder(serving.config.profile_dir, request.output_dir)
    report = await serving.client.profile(StartProfile(folder, request.num_steps, bool(request.with_stack)))
    return _profile_response(report, "started", f"a profile is being taken in {report.folder}; stop it first")


async def stop_profile(serving: Serving, http: Request) -> Response:
    """Ends the profile; returns when it is written -> {"status", "folder"}; 409 when none is being taken."""
    serving.require_ready()
    report = await serving.client.profile(StopProfile())
    return _profile_response(report, "stopped", "no profile is being taken; it may have ended after its num_steps")


def _profile_folder(root: str | None, wanted: str | None) -> str:
    """Never outside of root, whoever asks: a key for profiles should not be a key for writing files."""
    if root is None:
        raise unavailable("This server has no folder for profiles; start it with --profile-dir.", "storage_unavailable")
    root = os.path.realpath(root)
    name = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f") if wanted is None else wanted
    folder = os.path.realpath(os.path.join(root, name)) if "\0" not in name else ""
    if not folder.startswith(root + os.sep) or len(folder) > MAX_PATH:
        message = f"'output_dir' must name a folder below the server's folder for profiles (--profile-dir {root})."
        raise invalid_request(message, "output_dir")
    return folder


def _profile_response(report: ProfileReport, status: str, conflict: str) -> Response:
    if report.error is not None:
        raise APIError(500, f"The profiler failed: {report.error}", code="profile_failed")
    if report.conflict:
        raise APIError(409, f"{conflict[0].upper()}{conflict[1:]}.", code="profile_conflict")
    return json_response({"status": status, "folder": report.folder})


def _load(serving: Serving) -> dict[str, Any]:
    _, ready = serving.require_ready()
    stats = serving.client.stats
    running, waiting = (stats.num_running, stats.num_waiting) if stats else (0, 0)
    held = stats.num_held_pages if stats else 0
    prompt, cached = (stats.prompt_tokens_total, stats.cached_tokens_total) if stats else (0, 0)
    return {
        "dp_rank": 0,
        "num_running_reqs": running,
        "num_waiting_reqs": waiting,
        "num_total_reqs": running + waiting,
        "num_used_tokens": held * ready.page_size,
        "max_total_num_tokens": ready.num_pages * ready.page_size,
        "max_running_requests": ready.max_running,
        "token_usage": round(held / max(ready.num_pages, 1), 4),
        "utilization": round(running / max(ready.max_running, 1), 4),
        "cache_hit_rate": round(cached / prompt, 4) if prompt else 0.0,
        "gen_throughput": round(serving.metrics.throughput.value(), 2),
    }


async def loads(serving: Serving, http: Request) -> Response:
    """What the engine is doing, for load balancers: SGLang's /v1/loads."""
    load = _load(serving)
    total = {name: load[name] for name in ("num_running_reqs", "num_waiting_reqs", "num_total_reqs", "num_used_tokens")}
    aggregate = {f"total_{name.removeprefix('num_')}": value for name, value in total.items()}
    aggregate["avg_token_usage"] = load["token_usage"]
    now = datetime.now(UTC).isoformat()
    return json_response({"timestamp": now, "dp_rank_count": 1, "loads": [load], "aggregate": aggregate})


async def get_load(serving: Serving, http: Request) -> Response:
    """The same in SGLang's older shape: a list with one entry."""
    load = _load(serving)
    entry = {
        "dp_rank": 0,
        "num_reqs": load["num_total_reqs"],
        "num_waiting_reqs": load["num_waiting_reqs"],
        "num_tokens": load["num_used_tokens"],
    }
    return json_response([entry])
