"""From model, device and flags to the numbers everything is compiled for. Plain arithmetic; no device is touched."""

from dataclasses import dataclass

from jaxserve.config import ConfigError, EngineConfig, ModelConfig
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
    """What the engine is built with. notes: choices a person should know of, for the log."""

    dtype: str
    scheduler: SchedulerConfig
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """platform "cpu", "gpu" or "tpu"; memory in bytes of one device (None on CPU); the rest is of GPUs."""

    platform: str
    num_devices: int
    memory: int | None
    capability: str | None = None  # compute capability, "9.0"
    num_multiprocessors: int | None = None


def choose_dtype(config: EngineConfig, platform: str) -> str:
    if config.dtype != "auto":
        return config.dtype
    return "float32" if platform == "cpu" else "bfloat16"


def weight_bytes(model: ModelConfig, dtype: str) -> int:
    """Bytes of all parameters, an untied head counted once more where the embedding is tied."""
    attention = model.embed_dim * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    layer = attention + 3 * model.embed_dim * model.mlp_dim + 2 * model.embed_dim
    return ITEMSIZE[dtype] * (model.num_layers * layer + 2 * model.vocab_size * model.embed_dim + model.embed_dim)


def resolve(model: ModelConfig, config: EngineConfig, device: DeviceFacts) -> Sizes:
    """Raises ConfigError naming the flag when what was asked for does not fit."""
    notes: list[str] = []
    dtype = choose_dtype(config, device.platform)
    page_size = config.page_size or default_page_size(device.platform)
    max_running = config.max_running or (16 if device.platform == "cpu" else 256)
    token_bytes = bytes_per_token(model.num_layers, model.num_kv_heads, model.head_dim, ITEMSIZE[dtype])
    wanted = config.max_model_len or model.max_position
    if config.max_model_len and config.max_model_len > model.max_position:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} is more than the model's {model.max_position} positions"
        )
    num_pages = _num_pages(model, config, device, dtype, page_size, token_bytes, wanted)
    capacity = (num_pages - 1) * page_size
    if wanted > capacity:
        if config.max_model_len:
            raise ConfigError(
                f"--max-model-len {wanted} does not fit the KV cache of {capacity} tokens; "
                "lower it, or raise --max-total-tokens or --mem-fraction-static"
            )
        notes.append(
            f"context cut from {wanted} to {capacity} tokens, what the KV cache holds "
            "(--max-total-tokens makes it larger, --max-model-len smaller)"
        )
        wanted = capacity
    prefill = _prefill_ladder(config, device.platform, page_size, wanted, notes)
    scheduler = SchedulerConfig(
        num_pages=num_pages,
        page_size=page_size,
        max_model_len=wanted,
        max_running=max_running,
        decode_buckets=_decode_ladder(max_running, device.platform, dtype),
        prefill_buckets=prefill,
        mixed=(device.platform != "cpu") if config.mixed_chunk is None else config.mixed_chunk,
        policy=config.schedule_policy,
        radix_cache=not config.disable_radix_cache,
        max_batch_running=config.max_batch_running or max(1, max_running // BATCH_SHARE - 1),
        max_batch_prefill_tokens=_batch_prefill(config, prefill[-1][0], page_size),
        batch_linger=config.batch_linger,
        pooling=model.pooling,
    )
    return Sizes(dtype, scheduler, tuple(notes))


def _batch_prefill(config: EngineConfig, chunk: int, page_size: int) -> int:
    """Prompt tokens of batch work in a step while somebody interactive is there: whole pages, at least one."""
    asked = config.max_batch_prefill_tokens or chunk // BATCH_SHARE
    return max(page_size, -(-asked // page_size) * page_size)


def _num_pages(
    model: ModelConfig,
    config: EngineConfig,
    device: DeviceFacts,
    dtype: str,
    page_size: int,
    token_bytes: int,
    context: int,
) -> int:
    """Pages of the pool, scratch page 0 included."""
    if config.max_total_tokens is not None:
        return -(-config.max_total_tokens // page_size) + 1
    page_bytes = page_size * token_bytes
    if device.memory is None:
        budget = min(max(CPU_POOL_BYTES, (context + 2 * page_size) * token_bytes), CPU_MAX_POOL_BYTES)
    else:
        # Temporaries: logits of every row in float32 a few times over, and activations of a chunk.
        temporaries = 1 * GIB + 16 * model.vocab_size * 256
        weights = weight_bytes(model, dtype) / device.num_devices
        budget = int(device.memory * config.mem_fraction - weights - temporaries)
        page_bytes = -(-page_bytes // device.num_devices)
        if budget < page_bytes * 2:
            raise ConfigError(
                f"the weights need {weights / GIB:.1f} GiB and temporaries {temporaries / GIB:.1f} GiB of "
                f"{device.memory / GIB:.1f} GiB at --mem-fraction-static {config.mem_fraction}: nothing is left for "
                "the KV cache; use a smaller model or more devices"
            )
    pages = budget // page_bytes
    return pages - pages % _POOL_GRAIN if pages > 4 * _POOL_GRAIN else pages


def _decode_ladder(max_running: int, platform: str, dtype: str) -> tuple[int, ...]:
    """Powers of two (of four above 16 on accelerators, where a wider step costs little) up to max_running. On the CPU a
    product with one row is the quickest in float32, and slower than one with two in bfloat16."""
    smallest = (1 if dtype == "float32" else 2) if platform == "cpu" else 8
    sizes = []
    size = smallest
    while size < max_running:
        sizes.append(size)
        size *= 2
    return (*sizes, max_running)


def _prefill_ladder(
    config: EngineConfig, platform: str, page_size: int, context: int, notes: list[str]
) -> tuple[tuple[int, int], ...]:
    """(T, R): from one page up to the chunk size by powers of two (CPU, where a padded token costs as much as a real
    one) or four; R rows in each, which takes the decode ladder's sizes, as a step's last program is compiled per R."""
    asked = config.chunked_prefill_size or (256 if platform == "cpu" else 2048)
    chunk = -(-asked // page_size) * page_size
    if config.chunked_prefill_size and chunk != asked:
        notes.append(f"--chunked-prefill-size {asked} rounded up to {chunk}, whole pages of {page_size}")
    chunk = min(chunk, -(-context // page_size) * page_size)
    sizes = []
    size = page_size
    while size < chunk:
        sizes.append(size)
        size *= 2 if platform == "cpu" else 4
    fewest, most = (2, 8) if platform == "cpu" else (8, 16)
    return tuple((tokens, min(max(tokens // page_size, fewest), most)) for tokens in (*sizes, chunk))
