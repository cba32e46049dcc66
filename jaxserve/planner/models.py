"""--model of `jaxserve plan` -> ModelConfig. A config.json is enough, and nothing is fetched."""

import json
import os
from typing import Any

from checkpoints import gguf
from checkpoints.files import CheckpointError
from jaxserve.config import ConfigError, EngineConfig, ModelConfig
from jaxserve.engine.weights import read_model_config


def _llama(**values: Any) -> dict[str, Any]:
    common = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"}
    return common | values


def _llama3(factor: float, **values: Any) -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    shared = {"vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 5e5, "num_key_value_heads": 8}
    return _llama(rope_scaling=scaling, **shared, **values)


# Published architectures by their names, for a machine that has no file of theirs; keys as in config.json.
KNOWN: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _llama(
        num_hidden_layers=30,
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        max_position_embeddings=8192,
        rope_theta=1e5,
        tie_word_embeddings=True,
    ),
    "Llama-3.2-1B": _llama3(
        32.0,
        num_hidden_layers=16,
        hidden_size=2048,
        num_attention_heads=32,
        head_dim=64,
        intermediate_size=8192,
        tie_word_embeddings=True,
    ),
    "Llama-3.1-8B": _llama3(
        8.0, num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, intermediate_size=14336
    ),
    "Llama-3.3-70B": _llama3(
        8.0, num_hidden_layers=80, hidden_size=8192, num_attention_heads=64, intermediate_size=28672
    ),
    "Qwen3-32B": {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 25600,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
    },
}


def read_model(model: str) -> tuple[str, ModelConfig]:
    """A folder with config.json or one .gguf, such a file itself, a name of KNOWN, or a hub name whose config.json lies
    in the hub's cache -> a name for people, and the config. Raises ConfigError.
    """
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        return _folder(os.path.abspath(path))
    if os.path.isfile(path):
        return _file(os.path.abspath(path))
    short = model.rpartition("/")[2].removesuffix("-Instruct")
    known = {name.lower(): name for name in KNOWN}
    cached = _cached(model)
    if cached is not None:
        return model, _file(cached)[1]
    if short.lower() in known:
        name = known[short.lower()]
        return name, ModelConfig.from_hf(KNOWN[name])
    raise ConfigError(
        f"model {model!r} is not here; give a folder with a config.json, that file, a .gguf file, a hub name that was "
        f"fetched before, or one of {', '.join(KNOWN)}"
    )


def _folder(path: str) -> tuple[str, ModelConfig]:
    if os.path.isfile(os.path.join(path, "config.json")):
        return os.path.basename(path), read_model_config(EngineConfig(path, ""))
    ggufs = [name for name in os.listdir(path) if name.endswith(".gguf")]
    if len(ggufs) != 1:
        raise ConfigError(f"{path} has no config.json and {len(ggufs)} .gguf files; name a file")
    return _file(os.path.join(path, ggufs[0]))


def _file(path: str) -> tuple[str, ModelConfig]:
    folder, name = os.path.split(path)
    if name.endswith(".gguf"):
        try:
            return name.removesuffix(".gguf"), ModelConfig.from_hf(gguf.model_config(gguf.read_header(path)))
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
    if name == "config.json":
        return os.path.basename(folder), read_model_config(EngineConfig(folder, ""))
    try:
        with open(path, encoding="utf-8") as file:
            return name.removesuffix(".json"), ModelConfig.from_hf(json.load(file))
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{path} is no config.json: {error!r}") from error


def _cached(model: str) -> str | None:
    """The config.json of a hub name that was fetched before."""
    if model.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return found if isinstance(found, str) else None
