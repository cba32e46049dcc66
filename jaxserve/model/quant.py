"""Products with matrices of 8 bits an element: the matrix is widened inside the product, and the sums of each output
channel are multiplied by its scale. What comes in and goes out has the dtype of the activations."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxserve.config import Quantization

DTYPES: Mapping[Quantization, jnp.dtype] = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}


def product(equation: str, left: jax.Array, right: jax.Array, scale: jax.Array | None) -> jax.Array:
    """An einsum of activations and a kernel to "ot" or "to"; scale [out] float32 where the kernel is quantised. Every
    int8 and fp8 number is a bfloat16 number, and sums are float32 until they are scaled: only the kernel is rounded."""
    if scale is None:
        return jnp.einsum(equation, left, right)
    dtype = max(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
    out = jnp.einsum(equation, left.astype(dtype), right.astype(dtype), preferred_element_type=jnp.float32)
    return (out * (scale[:, None] if equation.endswith("ot") else scale)).astype(dtype)
