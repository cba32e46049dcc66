"""From model, device and flags to the numbers everything is compiled for. Plain arithmetic; no device is touched."""

from dataclasses import dataclass

from jaxserve.config import ConfigError, EngineConfig, ModelConfig
from jaxserve.model.partition import Shares
from jaxserve.scheduling.buckets import SchedulerConfig
from kernels_pallas.attention import default_page_size
from kernels_pallas.cache import bytes_per_token

GIB = 2**30
CPU_POOL_BYTES = 1 * GIB  # fixed, never a share of RAM: a server must not grow because the machine is large
CPU_MAX_POOL_BYTES = 4 * GIB  # grown to hold one full context, up to here; then the context is cut instead
ITEMSIZE = {"float32": 4, "bfloat16": 2}
# While somebody interactive is there, batch work gets this share of rows (less one, so that together they still fit a
# smaller program) and of a chunk: 1/4 keeps their latency near what it is alone and the batch above 1/4 of its pace.
BATCH_SHARE = 4
_POOL_GRAIN = 64  # pages; P is a static shape, and a pool one page off would miss every cached program


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the engine is built with: dp ranks of tp devices. notes: choices a person should know of, for the log."""

    dtype: str  # of weights and activations
    kv_dtype: str
    scheduler: SchedulerConfig  # of one rank
    notes: tuple[str, ...]
    dp: int = 1
    tp: int = 1


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """platform "cpu", "gpu" or "tpu"; memory in bytes of one device (None on CPU); prefers_bfloat16
    (engine.processor) and machine_code (kernels_pallas.cpu) are of CPUs, the rest of GPUs."""

    platform: str
    num_devices: int
    memory: int | None
    capability: str | None = None  # compute capability, "9.0"
    num_multiprocessors: int | None = None
    num_nodes: int = 1  # machines that the devices are in
    prefers_bfloat16: bool = False
    machine_code: bool = False


def choose_dtype(config: EngineConfig, device: DeviceFacts) -> str:
    if config.dtype != "auto":
        return config.dtype
    return "float32" if device.platform == "cpu" and not device.prefers_bfloat16 else "bfloat16"


def choose_kv_dtype(config: EngineConfig, dtype: str) -> str:
    """dtype: of the activations. Raises ConfigError."""
    named = {"auto": dtype, "float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn"}
    if config.kv_cache_dtype not in named:
        raise ConfigError(f"--kv-cache-dtype {config.kv_cache_dtype}: not served; {', '.join(named)} are")
    return named[config.kv_cache_dtype]


def weight_bytes(model: ModelConfig, dtype: str, tp: int = 1) -> int:
    """Bytes of the parameters on each of tp devices, an untied head counted once more where the embedding is tied."""
    shares = Shares.of(model, tp)
    heads, kv_heads = shares.num_heads * model.head_dim, shares.num_kv_heads * model.head_dim
    matrices = model.embed_dim * (2 * heads + 2 * kv_heads + 3 * shares.mlp_dim)
    norms = (2 * model.num_layers + 1) * model.embed_dim
    floats = ITEMSIZE[dtype] * (2 * shares.vocab_size * model.embed_dim + norms)
    if model.quantization is None:
        return floats + ITEMSIZE[dtype] * model.num_layers * matrices
    outputs = heads + 2 * kv_heads + 2 * shares.mlp_dim + 2 * model.embed_dim  # each has a float32 scale
    return floats + model.num_layers * (matrices + 4 * outputs)


def choose_mesh(model: ModelConfig, config: EngineConfig, device: DeviceFacts) -> tuple[int, int]:
    """-> dp, tp: the mesh that --dp-size and --tp-size ask for; where both are silent one device on a CPU, elsewhere
    all. Several machines use all of their devices, or one of them would have nothing to do.

    All devices share out the heads while no kv head would be held twice or padded: that is the shortest step. Beyond
    that ranks of their own use the rest, unless the weights need more devices. Raises ConfigError.
    """
    found, few = device.num_devices, device.platform == "cpu" and device.num_nodes == 1
    if config.tp_size or config.dp_size or few:
        dp = config.dp_size or 1
        tp = config.tp_size or (1 if few else max(found // dp, 1))
    else:
        even = [tp for tp in range(1, found + 1) if found % tp == 0]
        enough = [tp for tp in even if _weights_fit(model, config, device, tp)] or [found]
        tp = max((tp for tp in enough if Shares.of(model, tp).divides), default=enough[0])
        dp = found // tp
    if dp * tp > found:
        raise ConfigError(
            f"--tp-size {tp} and --dp-size {dp} take {dp * tp} devices; {found} of platform {device.platform} are there"
        )
    if dp * tp < found and device.num_nodes > 1:
        raise ConfigError(
            f"--tp-size {tp} and --dp-size {dp} take {dp * tp} of the {found} devices in {device.num_nodes} machines; "
            "all of them must be used: leave one of the two out, or start fewer machines"
        )
    return dp, tp


def _weights_fit(model: ModelConfig, config: EngineConfig, device: DeviceFacts, tp: int) -> bool:
    """Whether tp devices hold the weights and leave half as much again for the KV cache."""
    if device.memory is None:
        return True
    return 1.5 * weight_bytes(model, choose_dtype(config, device), tp) < device.memory * config.mem_fraction


def resolve(model: ModelConfig, config: EngineConfig, device: DeviceFacts) -> Sizes:
    """Raises ConfigError naming the flag when what was asked for does not fit."""
    notes: list[str] = []
    dtype = choose_dtype(config, device)
    kv_dtype = choose_kv_dtype(config, dtype)
    if device.platform == "cpu" and config.dtype == "auto" and dtype == "bfloat16":
        notes.append(
            "bfloat16, which this processor computes quickest (AMX); with --dtype float32 greedy and seeded text does "
            "not depend on what else is served"
        )
    page_size = config.page_size or default_page_size(device.platform)
    dp, tp = choose_mesh(model, config, device)
    # Rows and tokens that a person asks for are those of all ranks together.
    max_running = -(-(config.max_running or (16 if device.platform == "cpu" else 256) * dp) // dp)
    kv_heads = Shares.of(model, tp).num_kv_heads
    token_bytes = bytes_per_token(model.num_layers, kv_heads, model.head_dim, kv_dtype)
    wanted = config.max_model_len or model.max_position
    if config.max_model_len and config.max_model_len > model.max_position:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} is more than the model's {model.max_position} positions"
        )
    asked = None if config.max_total_tokens is None else -(-config.max_total_tokens // dp)
    chunk = min(_chunk_size(config, device.platform, page_size), wanted)
    memory = None if device.memory is None else _room(model, config, device.memory, dtype, tp, max_running, chunk)
    num_pages = _num_pages(asked, memory, page_size, token_bytes, wanted)
    capacity = (num_pages - 1) * page_size
    if wanted > capacity:
        if config.max_model_len:
            raise ConfigError(
                f"--max-model-len {wanted} does not fit the KV cache of {capacity} tokens{_each(dp)}; "
                "lower it, or raise --max-total-tokens or --mem-fraction-static"
            )
        notes.append(
            f"context cut from {wanted} to {capacity} tokens, what the KV cache holds{_each(dp)} "
            "(--max-total-tokens makes it larger, --max-model-len smaller)"
        )
        wanted = capacity
    prefill = _prefill_ladder(config, device.platform, page_size, wanted, notes)
    scheduler = SchedulerConfig(
        num_pages=num_pages,
        page_size=page_size,
        max_model_len=wanted,
        max_running=max_running,
        decode_buckets=_decode_ladder(max_running, device, dtype),
        prefill_buckets=prefill,
        mixed=(device.platform != "cpu") if config.mixed_chunk is None else config.mixed_chunk,
        policy=config.schedule_policy,
        radix_cache=not config.disable_radix_cache,
        max_batch_running=-(-config.max_batch_running // dp)
        if config.max_batch_running
        else max(1, max_running // BATCH_SHARE - 1),
        max_batch_prefill_tokens=_batch_prefill(config, prefill[-1][0], page_size),
        batch_linger=config.batch_linger,
        pooling=model.pooling,
    )
    return Sizes(dtype, kv_dtype, scheduler, tuple(notes), dp, tp)


def _each(dp: int) -> str:
    return f" of each of {dp} ranks" if dp > 1 else ""


def _batch_prefill(config: EngineConfig, chunk: int, page_size: int) -> int:
    """Prompt tokens of batch work in a step while somebody interactive is there: whole pages, at least one."""
    asked = config.max_batch_prefill_tokens or chunk // BATCH_SHARE
    return max(page_size, -(-asked // page_size) * page_size)


def _room(
    model: ModelConfig, config: EngineConfig, memory: int, dtype: str, tp: int, max_running: int, chunk: int
) -> int:
    """Bytes of a device that are left for the KV cache."""
    # Logits of every row in float32 a few times over (an H200's largest step took 1.26 GiB for 6 of them and the
    # activations, 8B, 272 rows), what sampling remembers of each slot, activations of a chunk, and what nobody counts.
    logits, state = 6 * 4 * max_running * model.vocab_size, 8 * max_running * model.vocab_size
    wide = 2 * Shares.of(model, tp).mlp_dim + 4 * model.embed_dim
    activations = 2 * ITEMSIZE[dtype] * (max_running + chunk) * wide
    temporaries = GIB // 4 + logits + state + activations
    weights = weight_bytes(model, dtype, tp)
    room = int(memory * config.mem_fraction - weights - temporaries)
    if room <= 0:
        raise ConfigError(
            f"the weights need {weights / GIB:.1f} GiB and temporaries {temporaries / GIB:.1f} GiB of "
            f"{memory / GIB:.1f} GiB at --mem-fraction-static {config.mem_fraction}: nothing is left for "
            "the KV cache; use a smaller model or more devices (--tp-size)"
        )
    return room


def _num_pages(max_tokens: int | None, room: int | None, page_size: int, token_bytes: int, context: int) -> int:
    """Pages of a rank's pool, scratch page 0 included. max_tokens: as asked for; room: bytes, None on CPU; token_bytes:
    on one device."""
    if max_tokens is not None:
        return -(-max_tokens // page_size) + 1
    if room is None:
        room = min(max(CPU_POOL_BYTES, (context + 2 * page_size) * token_bytes), CPU_MAX_POOL_BYTES)
    pages = room // (page_size * token_bytes)
    if pages < 2:
        raise ConfigError(
            f"{room / GIB:.1f} GiB are left for the KV cache, less than two pages of {page_size} tokens; use a smaller "
            "model, more devices (--tp-size) or a smaller --page-size"
        )
    return pages - pages % _POOL_GRAIN if pages > 4 * _POOL_GRAIN else pages


def _decode_ladder(max_running: int, device: DeviceFacts, dtype: str) -> tuple[int, ...]:
    """Powers of two (of four above 16 on accelerators, where a wider step costs little) up to max_running. By XLA on
    the CPU, a product with one row is slower than one with two in bfloat16."""
    smallest = (1 if device.machine_code or dtype == "float32" else 2) if device.platform == "cpu" else 8
    sizes = []
    size = smallest
    while size < max_running:
        sizes.append(size)
        size *= 2
    return (*sizes, max_running)


def _chunk_size(config: EngineConfig, platform: str, page_size: int) -> int:
    """Prefill tokens of a step at most, in whole pages; a shorter context makes it smaller."""
    return -(-(config.chunked_prefill_size or (256 if platform == "cpu" else 2048)) // page_size) * page_size


def _prefill_ladder(
    config: EngineConfig, platform: str, page_size: int, context: int, notes: list[str]
) -> tuple[tuple[int, int], ...]:
    """(T, R): from one page up to the chunk size by powers of two (CPU, where a padded token costs as much as a real
    one) or four; R rows in each, which takes the decode ladder's sizes, as a step's last program is compiled per R."""
    chunk = _chunk_size(config, platform, page_size)
    if config.chunked_prefill_size and chunk != config.chunked_prefill_size:
        asked = config.chunked_prefill_size
        notes.append(f"--chunked-prefill-size {asked} rounded up to {chunk}, whole pages of {page_size}")
    chunk = min(chunk, -(-context // page_size) * page_size)
    sizes = []
    size = page_size
    while size < chunk:
        sizes.append(size)
        size *= 2 if platform == "cpu" else 4
    fewest, most = (2, 8) if platform == "cpu" else (8, 16)
    return tuple((tokens, min(max(tokens // page_size, fewest), most)) for tokens in (*sizes, chunk))
