"""Frozen configuration values. Nothing here reads the environment; files are read by whoever hands the dict in."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_PORT = 30000


class ConfigError(ValueError):
    """A model or flag the user gave cannot be served; the message says what, what is allowed and what to change."""


def default_cache_dir(environ: Mapping[str, str], home: str) -> str:
    """Where models, converted checkpoints and compiled programs are kept unless --cache-dir says otherwise."""
    base = environ.get("XDG_CACHE_HOME") or f"{home}/.cache"
    return environ.get("JAXSERVE_CACHE_DIR") or f"{base}/jaxserve"


def default_storage_path(environ: Mapping[str, str], home: str) -> str:
    """Where files and batches are kept unless --file-storage-path says otherwise: with the user's data, since a cache
    may be emptied at any time."""
    return f"{environ.get('XDG_DATA_HOME') or f'{home}/.local/share'}/jaxserve/files"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Rotary frequency scaling.

    kind "llama3" is Llama 3.1's smooth low/high split; "linear" divides positions by factor.
    """

    kind: Literal["llama3", "linear"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


DECODERS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# What was published without a head, for vectors: the same decoders.
HEADLESS = {name.replace("ForCausalLM", "Model"): name for name in DECODERS}
# Keys of config.json that change what a model computes, and the values at which they do not.
_UNSERVED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, 1.0),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "logits_scaling": (1, 1.0),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "use_qk_norm": (False,),
}


Quantization = Literal["int8", "fp8"]


@dataclass(frozen=True, slots=True)
class StoredQuantization:
    """How a checkpoint holds the matrices of its layers: 8 bits an element, and scales beside them."""

    method: Quantization
    block: tuple[int, int] | None = None  # elements that share a scale; None: those of a row, or of the whole matrix


def stored_quantization(config: Mapping[str, Any]) -> StoredQuantization | None:
    """What quantization_config in config.json says; None: the weights are floats. Raises ConfigError that names what is
    not served."""
    found = config.get("quantization_config") or config.get("compression_config")
    if found is None:
        return None
    kind = found.get("quant_method", "compressed-tensors" if "config_groups" in found else None)
    if kind == "fp8":
        return StoredQuantization("fp8", _block(found.get("weight_block_size")))
    if kind == "compressed-tensors":
        return _compressed_tensors(found)
    raise ConfigError(
        f"quantization_config with quant_method {kind!r} in config.json is not served; 'fp8' and 'compressed-tensors' "
        "are: take the float checkpoint, and --quantization int8 or fp8"
    )


def _compressed_tensors(found: Mapping[str, Any]) -> StoredQuantization:
    """https://github.com/vllm-project/compressed-tensors: one scheme for all layers, weights of 8 bits around zero."""
    written = found.get("format")
    if written not in ("int-quantized", "float-quantized", "naive-quantized"):
        raise ConfigError(
            f"compressed-tensors in the format {written!r} are not served; 'int-quantized' and 'float-quantized' are"
        )
    if found.get("quantization_status", "compressed") != "compressed":
        raise ConfigError(
            f"compressed-tensors of the status {found['quantization_status']!r} are not served; 'compressed' are"
        )
    sparsity = (found.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise ConfigError(f"compressed-tensors with the sparsity {sparsity!r} are not served; 'dense' ones are")
    schemes = [group.get("weights") or {} for group in (found.get("config_groups") or {}).values()]
    kinds = {
        (each.get("type", "int"), each.get("num_bits"), each.get("strategy"), bool(each.get("symmetric", True)))
        for each in schemes
    }
    if len(kinds) != 1:
        raise ConfigError(f"compressed-tensors with {len(kinds)} schemes of weights are not served; those with one are")
    ((number, bits, strategy, symmetric),) = kinds
    if (number, bits) not in (("int", 8), ("float", 8)) or not symmetric or strategy not in _STRATEGIES:
        raise ConfigError(
            f"compressed-tensors weights of type {number!r}, {bits} bits, strategy {strategy!r}, symmetric {symmetric} "
            f"are not served; 8 bits, symmetric, with the strategies {', '.join(_STRATEGIES)} are"
        )
    block = _block(schemes[0].get("block_structure")) if strategy == "block" else None
    return StoredQuantization("int8" if number == "int" else "fp8", block)


_STRATEGIES = ("tensor", "channel", "block")


def _block(size: Any) -> tuple[int, int] | None:
    """[128, 128], or "128x128"."""
    if size is None:
        return None
    rows, columns = size.split("x") if isinstance(size, str) else size
    return int(rows), int(columns)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of the Llama type: Llama, Mistral, Qwen2, Qwen3.

    Letters as in docs/design.md: L layers, E embed, H query heads, K kv heads, D head dim, F mlp, V vocab.
    """

    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int
    max_position: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False  # of q, k and v
    output_bias: bool = False  # of o
    mlp_bias: bool = False
    qk_norm: bool = False  # each head of q and k is normalised before it is rotated
    windows: tuple[int | None, ...] = ()  # tokens that each layer sees, itself included; None: all. (): all layers all
    source_dtype: str = "float32"  # dtype the checkpoint was published in
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pooling: Literal["last", "mean"] = "last"  # the tokens that a prompt's vector is made of
    generates: bool = True  # False: published without a head, for vectors only
    quantization: Quantization | None = None  # of the layers' matrices; None: dtype

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads} query heads do not share {self.num_kv_heads} KV heads evenly")

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """[L]"""
        return self.windows or (None,) * self.num_layers

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> "ModelConfig":
        """config.json (and generation_config.json, whose eos ids are added) -> ModelConfig.

        Raises ConfigError that names what is asked for and not served.
        """
        named = (config.get("architectures") or ["LlamaForCausalLM"])[0]
        architecture = HEADLESS.get(named, named)
        if architecture not in DECODERS:
            served = ", ".join((*DECODERS, *HEADLESS, "BertModel"))
            raise ConfigError(f"architecture {named!r} is not served; {served} are")
        for key, harmless in _UNSERVED.items():
            if config.get(key) is not None and config[key] not in harmless:
                raise ConfigError(f"{key} {config[key]!r} in config.json is not served{_instead(harmless)}")
        stored = stored_quantization(config)
        heads = int(config["num_attention_heads"])
        rope = config.get("rope_parameters") or {}
        biases = bool(config.get("attention_bias", False)) and architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
        eos = _ids(config.get("eos_token_id")) + _ids((generation_config or {}).get("eos_token_id"))
        return cls(
            num_layers=int(config["num_hidden_layers"]),
            embed_dim=int(config["hidden_size"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or _default_head_dim(config, architecture)),
            mlp_dim=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            max_position=int(config.get("max_position_embeddings", 2048)),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling(config.get("rope_scaling") or rope),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)) or named in HEADLESS,
            attention_bias=biases or architecture == "Qwen2ForCausalLM",
            output_bias=biases,
            mlp_bias=bool(config.get("mlp_bias", False)) and architecture == "LlamaForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
            windows=_windows(config, architecture),
            source_dtype=str(config.get("torch_dtype") or config.get("dtype") or "float32"),
            bos_token_id=next(iter(_ids(config.get("bos_token_id"))), None),
            eos_token_ids=tuple(dict.fromkeys(eos)),
            generates=named not in HEADLESS,
            quantization=None if stored is None else stored.method,
        )

    def quantized(self, wanted: str) -> "ModelConfig":
        """As --quantization says: auto, as the checkpoint is; none, in floats whatever it is. Raises ConfigError for
        another method than the checkpoint's own."""
        if wanted == "auto" or wanted == self.quantization:
            return self
        if wanted == "none":
            return replace(self, quantization=None)
        if wanted not in get_args(Quantization):
            raise ConfigError(f"--quantization {wanted}: not served; auto, none, int8 and fp8 are")
        if self.quantization is not None:
            raise ConfigError(
                f"--quantization {wanted}: the checkpoint is {self.quantization} already; leave the flag out, or widen "
                "its weights to --dtype with none"
            )
        return replace(self, quantization="int8" if wanted == "int8" else "fp8")


def _instead(harmless: tuple[Any, ...]) -> str:
    return f"; {harmless[0]!r} is" if harmless else ""


def _default_head_dim(config: Mapping[str, Any], architecture: str) -> int:
    if architecture == "Qwen3ForCausalLM":
        return 128
    return int(config["hidden_size"]) // int(config["num_attention_heads"])


def _windows(config: Mapping[str, Any], architecture: str) -> tuple[int | None, ...]:
    """Of each layer, as transformers reads them: Mistral's hold for all layers; Qwen's must be switched on, and hold
    from layer max_window_layers on; layer_types, where it is there, says each layer's."""
    window, count = config.get("sliding_window"), int(config["num_hidden_layers"])
    if architecture == "LlamaForCausalLM" or window is None:
        return ()
    if architecture.startswith("Qwen") and not config.get("use_sliding_window", False):
        return ()
    kinds = config.get("layer_types")
    if kinds is None:
        first = int(config.get("max_window_layers", 28)) if architecture.startswith("Qwen") else 0
        return tuple(int(window) if layer >= first else None for layer in range(count))
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown or len(kinds) != count:
        asked = ", ".join(unknown) or f"of {len(kinds)} layers, not {count},"
        raise ConfigError(f"layer_types {asked} is not served; 'full_attention' and 'sliding_attention' are")
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _rope_scaling(scaling: Mapping[str, Any]) -> RopeScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(f"partial_rotary_factor {scaling['partial_rotary_factor']!r} is not served; 1 is")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(scaling["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(scaling["factor"]),
            float(scaling["low_freq_factor"]),
            float(scaling["high_freq_factor"]),
            int(scaling["original_max_position_embeddings"]),
        )
    raise ConfigError(f"rope scaling {kind!r} is not served; 'default', 'linear' and 'llama3' are")


Pooling = Literal["mean", "cls", "last"]
_POOLING_MODES: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean",  # the same direction, and vectors are normalised
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


def pooling_of(pooling: Mapping[str, Any]) -> Pooling:
    """sentence-transformers' 1_Pooling/config.json -> how a text's tokens become one vector. Raises ConfigError."""
    wanted = [name for name, value in pooling.items() if name.startswith("pooling_mode") and value is True]
    if isinstance(named := pooling.get("pooling_mode"), str):
        wanted = [{"cls": "pooling_mode_cls_token", "lasttoken": "pooling_mode_lasttoken"}.get(named, named)]
        wanted = ["pooling_mode_mean_tokens" if name == "mean" else name for name in wanted]
    if len(wanted) != 1 or wanted[0] not in _POOLING_MODES:
        raise ConfigError(f"pooling by {' and '.join(wanted) or 'nothing'} is not served; mean, cls and last token are")
    return _POOLING_MODES[wanted[0]]


ENCODERS = ("BertModel", "BertForMaskedLM", "BertForPreTraining")
Activation = Literal["gelu", "gelu_new", "relu"]
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "relu": "relu",
}


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """A BERT-type encoder, which turns a text into one vector. Letters as ModelConfig's."""

    num_layers: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    vocab_size: int
    max_position: int
    max_seq_len: int  # tokens of one text, special ones included; what the model was published for
    num_token_types: int = 2
    norm_eps: float = 1e-12
    activation: Activation = "gelu"
    pooling: Pooling = "mean"

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], pooling: Mapping[str, Any] | None, sentence: Mapping[str, Any] | None
    ) -> "EncoderConfig":
        """config.json, and sentence-transformers' 1_Pooling/config.json and sentence_bert_config.json where they are.

        Without the second, tokens are averaged, as sentence-transformers does. Raises ConfigError for what is not
        served, KeyError for what is missing.
        """
        positions = config.get("position_embedding_type", "absolute")
        if positions != "absolute" or config.get("is_decoder"):
            raise ConfigError(f"a BERT with {positions} positions is not served; encoders with absolute ones are")
        activation = _ACTIVATIONS.get(str(config.get("hidden_act", "gelu")))
        if activation is None:
            raise ConfigError(f"hidden_act {config['hidden_act']!r} is not served; {', '.join(_ACTIVATIONS)} are")
        max_position = int(config["max_position_embeddings"])
        return cls(
            num_layers=int(config["num_hidden_layers"]),
            embed_dim=int(config["hidden_size"]),
            num_heads=int(config["num_attention_heads"]),
            mlp_dim=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            max_position=max_position,
            max_seq_len=min(int((sentence or {}).get("max_seq_length") or max_position), max_position),
            num_token_types=int(config.get("type_vocab_size", 2)),
            norm_eps=float(config.get("layer_norm_eps", 1e-12)),
            activation=activation,
            pooling="mean" if pooling is None else pooling_of(pooling),
        )


@dataclass(frozen=True, slots=True)
class Cluster:
    """Several machines that serve one model, and which of them this one is."""

    num_nodes: int
    rank: int  # 0: the one with the front end and the scheduler
    host: str  # of rank 0, as the others reach it
    port: int  # of JAX's coordinator there; plans come from port + 1
    secret: bytes = field(repr=False)  # that all of them know; empty: nothing leaves this machine
    join_timeout: float = 600.0  # seconds until all of them must be there


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine process is told. None means: chosen from the model and the device, and said in the log."""

    model_path: str  # local folder: HF files, a converted checkpoint, or config.json alone with load_format "dummy"
    cache_dir: str
    tokenizer_path: str | None = None  # folder of the tokenizer.json that grammars are made for; None: model_path
    load_format: Literal["auto", "safetensors", "gguf", "orbax", "dummy"] = "auto"
    gguf_path: str | None = None  # weights come from this file; model_path holds its tokenizer.json and config.json
    orbax_path: str | None = (
        None  # weights come from this converted checkpoint, written from gguf_path first if it is absent
    )
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal["auto", "none", "int8", "fp8"] = "auto"  # of the layers' matrices; auto: as stored
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "int8", "fp8"] = "auto"  # auto: that of the activations
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    attention_backend: Literal["auto", "pallas", "numba", "xla"] = "auto"  # see kernels_pallas.attention.choose
    tp_size: int | None = None  # devices that share out the heads of every layer
    dp_size: int | None = None  # ranks of tp_size devices that serve rows of their own; both None: all devices
    max_model_len: int | None = None
    max_running: int | None = None  # rows that decode together
    max_total_tokens: int | None = None  # tokens of KV cache
    mem_fraction: float = 0.88  # of total device memory, for weights, temporaries and KV cache; not used on CPU
    page_size: int | None = None
    chunked_prefill_size: int | None = None  # rounded up to a page
    schedule_policy: Literal["lpm", "fcfs"] = "lpm"
    disable_radix_cache: bool = False
    disable_overlap: bool = False
    mixed_chunk: bool | None = None  # prefill and decode in one step; None: where it pays
    compilation_cache_dir: str | None = None  # None: <cache_dir>/programs
    decode_log_interval: int = 40
    watchdog_timeout: float = 300.0  # seconds a step may take, compiles excluded; 0 = off
    random_seed: int = 0  # of dummy weights; the front end's is of requests
    record_plans: str | None = None  # file that gets every step's plan when the engine ends: a debugging aid
    max_batch_running: int | None = None  # rows of batch work in a step while somebody interactive is there
    max_batch_prefill_tokens: int | None = None  # prompt tokens of batch work in a step, at such times
    batch_linger: float = 2.0  # seconds after the last interactive request that still count as such times
    log_level: str = "info"
    cluster: Cluster | None = None  # None: one machine

    @property
    def allocator_fraction(self) -> float:
        """Of a GPU's memory, what XLA's allocator may take: a little more than is planned for, since what the fastest
        products need beside their results is found by trying them."""
        return self.mem_fraction + min(0.05, (1 - self.mem_fraction) / 2)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What the front end is told: the door, the names it answers to, and the habits of the HTTP API."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    api_key: str | None = None  # None: every bearer token is accepted
    admin_api_key: str | None = None  # of the routes that change the server; None: api_key is theirs too
    disable_ui: bool = False  # no page at /
    allowed_origins: tuple[str, ...] = ()  # of web pages that may call this server from a browser; "*": all
    ssl_certfile: str | None = None  # PEM; None: plain HTTP
    ssl_keyfile: str | None = None  # None: the key is in ssl_certfile
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None  # PEM of who may have signed the clients' certificates
    ssl_cert_reqs: int = 0  # of clients, as in Python's ssl module: 0 none, 1 optional, 2 required
    profile_dir: str | None = None  # folder of profiles; None: in the cache directory
    model_path: str = ""  # as resolved; reported by /get_model_info and /v1/models
    served_model_names: tuple[
        str, ...
    ] = ()  # the first is the one that /v1/models lists first; filled in by launch if empty
    allow_any_model: bool = False  # answer requests for unknown model names instead of 404
    max_queued_requests: int | None = None  # requests that wait for a row before 503; None: no limit
    max_body_size: int = 32  # MiB of one request body
    tokenizer_path: str | None = None  # local folder; None: the model's own
    chat_template: str | None = None  # path of a Jinja file, used instead of the model's own
    tool_call_parser: Literal["auto", "hermes", "llama3", "pythonic", "none"] = "auto"  # how the model writes calls
    reasoning_parser: Literal["auto", "deepseek-r1", "qwen3", "none"] = "auto"  # whether it begins with <think>
    sampling_defaults: Literal["model", "openai"] = "model"  # generation_config.json, or temperature 1 and top_p 1
    random_seed: int | None = None  # of requests that bring none; None: another at every start
    stream_interval: int = 1  # tokens per streamed chunk, at least
    enable_cache_report: bool = True  # usage.prompt_tokens_details.cached_tokens
    log_level: str = "info"
    log_level_http: str | None = None  # of the access log; None: log_level
    log_requests: bool = False  # one line per request: sizes and parameters, never its text
    embedding_only: bool = False  # chat and completions are a 400
    shutdown_timeout: float = 30.0  # seconds that open requests get to finish after SIGINT or SIGTERM
    store: str | None = None  # postgresql://…, which many servers may share; None: SQLite in file_storage_path
    file_storage_path: str | None = None  # folder of files and batches; None: default_storage_path
    batch_concurrency: int | None = None  # requests of batches in flight; None: twice the engine's rows
