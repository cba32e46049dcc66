"""jaxserve: an OpenAI-compatible inference server on JAX/XLA. Importing this package imports nothing heavy."""

from typing import TYPE_CHECKING, Any

from jaxserve.version import __version__

if TYPE_CHECKING:
    from jaxserve.llm import LLM

__all__ = ["LLM", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from jaxserve.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
