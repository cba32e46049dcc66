"""Prompt ids -> vectors: submits "embed" requests, waits for them, and aborts what nobody waits for any more."""

import json
import os
from collections.abc import Sequence

from jaxserve.client import EngineClient, EngineUnavailable, merge
from jaxserve.types import Request, SamplingParams

_NO_TOKEN = SamplingParams(max_tokens=0, seed=0)


async def embed(client: EngineClient, prompt_ids: Sequence[int], priority: int = 0) -> tuple[bytes, int]:
    """One prompt -> ([E] float32, pooled and of length 1, as bytes; its number of tokens). Raises as embed_all."""
    return (await embed_all(client, [prompt_ids], priority))[0], len(prompt_ids)


async def embed_all(
    client: EngineClient, prompts: Sequence[Sequence[int]], priority: int = 0, owner: object = None
) -> list[bytes]:
    """prompts (1 to max_model_len ids each), priority 0 interactive, 1 batch -> a vector of each, in their order.

    owner: whom they are computed for (EngineClient.end_requests). All are submitted as one message; a caller that is
    cancelled aborts them. Raises EngineUnavailable (the engine ended, or gave a request up), EngineOverloaded.
    """
    requests = [Request(client.next_id(), tuple(ids), _NO_TOKEN, priority, task="embed") for ids in prompts]
    streams = client.submit(requests, owner)
    try:
        async for _, events in merge(streams):
            if events[-1].finish_reason == "abort":
                raise EngineUnavailable("the engine gave this request up; send it again")
        vectors = [stream.vector for stream in streams]
        if any(vector is None for vector in vectors):
            raise EngineUnavailable("the engine ended this request without a vector")
        return [vector for vector in vectors if vector is not None]
    finally:
        for stream in streams:
            stream.abort()


def matryoshka_sizes(folder: str) -> tuple[int, ...] | None:
    """The sizes that config.json says a vector may be cut to (Kusupati et al. 2022): matryoshka_dimensions, or () for
    any where it says is_matryoshka; None where it says neither."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    sizes = config.get("matryoshka_dimensions")
    if isinstance(sizes, list) and sizes:
        return tuple(sorted(size for size in sizes if type(size) is int))
    return () if config.get("is_matryoshka") is True else None
