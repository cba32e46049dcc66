"""What may differ between the layers of a model: how far back a token sees, and what becomes of its scores."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class LayerKind:
    """How the layers of one kind attend. Static: it is part of a program, and of the plan that such layers share.

    Raises ValueError for a window or a cap that is not positive.
    """

    window: int | None = None  # a token sees itself and the window - 1 before it; None: everything before it
    softcap: float | None = None  # scores become softcap * tanh(score / softcap), before the mask (Gemma 2)
    scale: float | None = None  # what q k is multiplied by; None: head_dim ** -0.5

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window {self.window}: a token sees at least itself, so 1 or more, or None for no window")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap {self.softcap}: a number above 0, or None for no cap")

    def scale_of(self, head_dim: int) -> float:
        return head_dim**-0.5 if self.scale is None else self.scale

    def capped(self, scores: jax.Array) -> jax.Array:
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def first_page(self, positions: jax.Array, page_size: int) -> jax.Array:
        """positions [...] of queries -> [...] the page, in a row's order, of the first token that each sees."""
        if self.window is None:
            return jnp.zeros_like(positions)
        return jnp.maximum(positions - (self.window - 1), 0) // page_size

    def most_pages(self, max_pages: int, page_size: int, num_queries: int = 1) -> int:
        """Pages that consecutive queries see at most, of rows of max_pages."""
        if self.window is None:
            return max_pages
        tokens = self.window + num_queries - 1
        return min((tokens - 2) // page_size + 2, max_pages)

    def last_pages(self, page_table: jax.Array, kv_lens: jax.Array, page_size: int) -> tuple[jax.Array, jax.Array]:
        """page_table [S, M], kv_lens [S] of decode rows -> the same from the first page that a row's new token sees:
        [S, most_pages] and [S]. Only the first page of a row so cut may hold tokens that are out of its window."""
        if self.window is None:
            return page_table, kv_lens
        max_pages = page_table.shape[1]
        first = self.first_page(jnp.maximum(kv_lens - 1, 0), page_size)
        seen = first[:, None] + jnp.arange(self.most_pages(max_pages, page_size), dtype=first.dtype)
        return jnp.take_along_axis(page_table, jnp.minimum(seen, max_pages - 1), axis=1), kv_lens - first * page_size


FULL = LayerKind()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Work:
    """What the layers of one kind share in a step; all but the kind is a backend's own."""

    decode: Any  # None or empty: no decode rows
    prefill: Any  # None: no chunks
    kind: LayerKind = field(metadata={"static": True})
    writes: Any = None  # where new tokens go, where that is a matter of its own
