"""Which files hold the weights, and how they become the model's flat leaves."""

import json
import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

import jax

from checkpoints import bert, llama
from checkpoints.convert import OrbaxSource, convert, open_source
from checkpoints.files import CheckpointError, SafetensorsSource, TensorSource
from checkpoints.gguf import GGUFSource
from checkpoints.load import DummySource, Part, Target, load
from checkpoints.quant import FORMATS, SCALE, QuantisedSource, WideSource
from jaxserve.config import (
    ENCODERS,
    ConfigError,
    EncoderConfig,
    EngineConfig,
    ModelConfig,
    pooling_of,
    stored_quantization,
)
from jaxserve.model.sharding import Parameter, Params
from jaxserve.model.stacked import Stacks

logger = logging.getLogger(__name__)

Report = Callable[[str, int, int, str], None]  # stage, done, total, message
_POOLING = "1_Pooling"  # sentence-transformers' folder beside the model


def read_model_config(config: EngineConfig, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """config.json, generation_config.json and 1_Pooling/config.json of the model folder. Raises ConfigError."""
    path = os.path.join(config.model_path, "config.json")
    if not os.path.isfile(path):
        raise ConfigError(f"{config.model_path} holds no config.json; --model takes a folder in Hugging Face's format")
    generation = os.path.join(config.model_path, "generation_config.json")
    try:
        model = ModelConfig.from_hf(
            {**_read_json(path), **(overrides or {})}, _read_json(generation) if os.path.isfile(generation) else None
        )
    except KeyError as error:
        raise ConfigError(f"{path} lacks {error}") from error
    return replace(model.quantized(config.quantization), pooling=_decoder_pooling(config.model_path))


def _decoder_pooling(folder: str) -> Literal["last", "mean"]:
    path = os.path.join(folder, _POOLING, "config.json")
    pooling = pooling_of(_read_json(path)) if os.path.isfile(path) else "last"
    if pooling == "cls":
        raise ConfigError(
            f"{path} asks for the first token, which in this model sees no other; last and mean are served"
        )
    return pooling


_SERVED_MODULES = ("Transformer", "Pooling", "Normalize")  # vectors are always normalised


def read_encoder_config(config: EngineConfig) -> EncoderConfig | None:
    """What config.json and sentence-transformers' files beside it say; None for a decoder. Raises ConfigError."""
    path = os.path.join(config.model_path, "config.json")
    if not os.path.isfile(path):
        return None
    values = _read_json(path)
    if (values.get("architectures") or [""])[0] not in ENCODERS:
        return None
    folder = config.model_path
    for module in _read_optional(os.path.join(folder, "modules.json")) or ():
        if str(module.get("type")).rpartition(".")[2] not in _SERVED_MODULES:
            raise ConfigError(f"{folder}: modules.json asks for {module.get('type')}, which is not served")
    try:
        return EncoderConfig.from_hf(
            values,
            _read_optional(os.path.join(folder, _POOLING, "config.json")),
            _read_optional(os.path.join(folder, "sentence_bert_config.json")),
        )
    except KeyError as error:
        raise ConfigError(f"{path} lacks {error}") from error


def load_params(
    config: EngineConfig,
    model: ModelConfig | EncoderConfig,
    description: Params,
    report: Report,
    *,
    period: int | None = None,
) -> Params:
    """Params of Parameter descriptions -> Params of arrays on their devices; period: see model.stacked. Converts the
    default model once."""
    parameters = jax.tree.leaves(description)
    shapes = {name: shape for p in parameters for name, shape in p.tensors.items()}
    source = _in_format(_open(config, shapes, report), config, model, shapes)
    stored_name = bert.stored_name if isinstance(model, EncoderConfig) else llama.stored_name
    names = {name: stored_name(name, source.tensors) for name in shapes}
    targets = {p.path: _target(p, names) for p in parameters}
    stacks = Stacks(description, period)

    def progress(done: int, total: int, message: str) -> None:
        report("load", done, total, message)

    return stacks.params(load(source, targets, progress=progress, take=stacks.take))


def _in_format(
    source: TensorSource, config: EngineConfig, model: ModelConfig | EncoderConfig, names: Collection[str]
) -> TensorSource:
    """The source with its matrices as the model has them: those of which names has the scales in 8 bits, others in
    floats. Raises CheckpointError where a quantised checkpoint leaves some out and nobody asked for those."""
    if isinstance(model, EncoderConfig):
        return source
    stored = stored_quantization(_read_json(os.path.join(config.model_path, "config.json")))
    wide = WideSource(source, None if stored is None else stored.block)
    if model.quantization is None:
        return source if stored is None else wide
    matrices = [llama.stored_name(name.removesuffix(SCALE), source.tensors) for name in names if name.endswith(SCALE)]
    made = QuantisedSource(wide, FORMATS[model.quantization], matrices)
    if stored is not None and made.quantised and config.quantization == "auto" and stored.block is None:
        raise CheckpointError(
            f"{wide.path}: {len(made.quantised)} of {len(matrices)} matrices, as {made.quantised[0]!r}, are not "
            f"{model.quantization} with a scale; --quantization {model.quantization} quantises these too, none widens "
            "all"
        )
    logger.info(
        "weights: %d matrices in %s, of which %d are quantised now",
        len(matrices),
        model.quantization,
        len(made.quantised),
    )
    return made


def _target(p: Parameter, names: Mapping[str, str]) -> Target:
    """names: Hugging Face's -> as stored."""
    parts = tuple(Part(None if rows.tensor is None else names[rows.tensor], rows.start, rows.count) for rows in p.rows)
    tensors = {names[name]: shape for name, shape in p.tensors.items()}
    return Target(tensors, p.dtype, p.sharding, transpose=p.transpose, axis=p.axis, parts=parts)


def _open(config: EngineConfig, shapes: Mapping[str, tuple[int, ...]], report: Report) -> TensorSource:
    if config.load_format == "dummy":
        floats = {name: shape for name, shape in shapes.items() if not name.endswith(SCALE)}
        return DummySource(floats, config.random_seed)
    if config.orbax_path and config.gguf_path and config.load_format in ("auto", "orbax"):
        if not os.path.isdir(config.orbax_path):
            convert(
                GGUFSource(config.gguf_path),
                config.orbax_path,
                extra_files=config.model_path,
                progress=lambda done, total, message: report("convert", done, total, message),
            )
        return OrbaxSource(config.orbax_path)
    if config.gguf_path:
        return GGUFSource(config.gguf_path)
    if config.load_format == "safetensors":
        return SafetensorsSource(config.model_path)
    if config.load_format == "orbax":
        return OrbaxSource(config.model_path)
    return open_source(config.model_path)


def _read_optional(path: str) -> Any:
    return _read_json(path) if os.path.isfile(path) else None


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
