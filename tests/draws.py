"""What a seeded row must draw: the sampler's definition (model.sampling) in plain numpy, on logits of a float64
model."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.gguf import GGUFSource
from checkpoints.hub import resolve_model
from jaxserve.config import DEFAULT_MODEL
from tests.tiny_llama import numpy_forward

TIE = 1e-5  # distance in the CDF below which two tokens count as tied
END = 2  # the default model's end-of-message token


def reference_logits(cache_dir: str, token_ids: Sequence[int]) -> np.ndarray:
    """token_ids [T] -> logits [T, V] of the default model in float64, with the weights of its GGUF file."""
    folder, weights = _default_model(cache_dir)
    return numpy_forward(folder, token_ids, weights)


@functools.cache
def _default_model(cache_dir: str) -> tuple[str, dict[str, np.ndarray]]:
    model = resolve_model(DEFAULT_MODEL, cache_dir=cache_dir, progress=lambda done, total, message: None)
    assert model.gguf_path is not None
    source = GGUFSource(model.gguf_path)
    return model.folder, {name: source.read(name) for name in source.tensors}


def drawn_cdf(
    logits: np.ndarray, prompt: Sequence[int], output: Sequence[int], options: Mapping[str, Any]
) -> np.ndarray:
    """logits [V] after prompt and output -> the CDF [V] from which LLM.generate(**options) draws the next token."""
    scores = _penalised(logits.astype(np.float64), prompt, output, options) / options.get("temperature", 1.0)
    weights = np.exp(scores - scores.max())
    order = np.argsort(-weights, kind="stable")
    if top_k := options.get("top_k", 0):
        weights[weights < weights[order[top_k - 1]]] = 0
    mass = np.cumsum(weights[order]) / weights.sum()
    last = order[min(int((mass < options.get("top_p", 1.0)).sum()), len(order) - 1)]
    if options.get("top_p", 1.0) < 1:
        weights[weights < weights[last]] = 0
    weights[weights < options.get("min_p", 0.0)] = 0
    return np.cumsum(weights) / weights.sum()


def _penalised(
    scores: np.ndarray, prompt: Sequence[int], output: Sequence[int], options: Mapping[str, Any]
) -> np.ndarray:
    seen = np.unique([*prompt, *output])
    repetition = options.get("repetition_penalty", 1.0)
    scores[seen] = np.where(scores[seen] > 0, scores[seen] / repetition, scores[seen] * repetition)
    for token, count in zip(*np.unique(np.asarray(output, np.int64), return_counts=True), strict=True):
        scores[token] -= options.get("presence_penalty", 0.0) + count * options.get("frequency_penalty", 0.0)
    for token, bias in options.get("logit_bias", {}).items():
        scores[token] += bias
    if len(output) < options.get("min_tokens", 0):
        scores[END] = -np.inf
    return scores


def draw(cdf: np.ndarray, uniform: float) -> int:
    """The first token, in vocabulary order, whose cumulated probability exceeds the random number."""
    return int((cdf <= uniform).sum())


def is_tie(cdf: np.ndarray, uniform: float, one: int, other: int) -> bool:
    """The random number lies so close to the border between the two tokens that rounding decides."""
    low, high = sorted((one, other))
    return bool(abs(cdf[low] - uniform) < TIE and abs(cdf[high - 1] - uniform) < TIE)


def uniform_at(seed: int, position: int, choice: int = 0) -> float:
    """The first word of fold_in(fold_in(seed, choice), position), threefry2x32, as a share of 2^32."""
    words = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
    key = jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, choice), position)
    return int(jax.random.key_data(key)[0]) / 2**32


def same_but_for_a_tie(
    cache_dir: str,
    prompt: Sequence[int],
    one: Sequence[int],
    other: Sequence[int],
    options: Mapping[str, Any],
    choice: int = 0,
) -> int:
    """Tokens that could be compared: all of them, or those up to a difference, which must be a tie (asserted).

    Float32 products of 2 and of 16 rows round differently; where the distribution is flat, that moves one of its
    thousands of borders over the random number once in some hundred tokens. What follows is another text.
    """
    same = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    if same == max(len(one), len(other)):
        return same
    tokens = [int(ids[same]) if same < len(ids) else END for ids in (one, other)]
    ids = [*prompt, *one[:same]]
    cdf = drawn_cdf(reference_logits(cache_dir, ids)[-1], prompt, one[:same], options)
    uniform = uniform_at(options["seed"], len(ids), choice)
    borders = [float(cdf[min(tokens)]), float(cdf[max(tokens) - 1])]
    assert is_tie(cdf, uniform, *tokens), f"token {same} is {tokens}; {uniform:.8f} is no tie between {borders}"
    return same + 1
