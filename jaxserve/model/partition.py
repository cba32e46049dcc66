"""What each device of the "tp" axis holds of a model: plain arithmetic, no array is touched.

Tensor parallelism as in Shoeybi et al. 2019 (Megatron-LM), §3: heads, mlp features and the vocabulary are shared out,
so that a layer adds up twice, behind o and behind down. What does not divide is filled up with zeros, which add
nothing.
"""

from dataclasses import dataclass

from jaxserve.config import ModelConfig

Segment = tuple[int | None, int]  # first row of the tensor (None: zeros), and how many rows


@dataclass(frozen=True, slots=True)
class Shares:
    """One device's sizes, equal on all tp devices, and which part of an axis each of them holds."""

    tp: int
    num_heads: int  # query heads of one device
    num_kv_heads: int
    mlp_dim: int
    vocab_size: int
    copies: int  # devices that share one kv head, each with a part of its query heads
    config: ModelConfig

    @classmethod
    def of(cls, config: ModelConfig, tp: int) -> "Shares":
        """While there are as many kv heads as devices each device gets whole kv heads with all their query heads, else
        each kv head goes to tp // K devices and its query heads are shared out among these."""
        kv_heads, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
        copies = max(tp // kv_heads, 1)
        local_kv_heads = -(-kv_heads // tp)
        return cls(
            tp=tp,
            num_heads=local_kv_heads * -(-group // copies),
            num_kv_heads=local_kv_heads,
            mlp_dim=-(-config.mlp_dim // tp),
            vocab_size=-(-config.vocab_size // tp),
            copies=copies,
            config=config,
        )

    @property
    def divides(self) -> bool:
        """Whether no head is held twice and none is filled up: a device's share is 1 / tp of the KV cache."""
        return self.config.num_kv_heads % self.tp == 0

    def segments(self, axis: str, device: int) -> tuple[Segment, ...]:
        """What a device holds of a tensor's axis: "heads", "kv_heads", "mlp" or "vocab"; rows, in order."""
        config, dim = self.config, self.config.head_dim
        if axis == "heads":
            return tuple(segment for slot in self._heads(device) for segment in _head(slot, dim))
        if axis == "kv_heads":
            return tuple(segment for slot in self._kv_heads(device) for segment in _head(slot, dim))
        size, share = {"mlp": (config.mlp_dim, self.mlp_dim), "vocab": (config.vocab_size, self.vocab_size)}[axis]
        start = min(device * share, size)
        real = min(share, size - start)
        return ((start, real), (None, share - real))

    def _kv_heads(self, device: int) -> list[int | None]:
        first = device // self.copies * self.num_kv_heads
        heads = range(first, first + self.num_kv_heads)
        return [head if head < self.config.num_kv_heads else None for head in heads]

    def _heads(self, device: int) -> list[int | None]:
        """Query heads by kv head, as attention groups them."""
        group = self.config.num_heads // self.config.num_kv_heads
        share = self.num_heads // self.num_kv_heads
        first = device % self.copies * share
        slots: list[int | None] = []
        for kv_head in self._kv_heads(device):
            for place in range(first, first + share):
                slots.append(None if kv_head is None or place >= group else kv_head * group + place)
        return slots


def _head(head: int | None, dim: int) -> tuple[Segment, ...]:
    return ((None if head is None else head * dim, dim),)


def merged(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """The same rows in as few segments as possible, empty ones left out."""
    result: list[Segment] = []
    for start, count in segments:
        if not count:
            continue
        if result:
            before, length = result[-1]
            follows = before is None if start is None else before is not None and before + length == start
            if follows:
                result[-1] = (before, length + count)
                continue
        result.append((start, count))
    return tuple(result)
