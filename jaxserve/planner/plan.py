"""make_plan and compare: does a model fit a slice, whom would it serve, and how fast at best."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from jaxserve.config import ConfigError, EngineConfig, ModelConfig
from jaxserve.engine.build import Blueprint, draw
from jaxserve.engine.chips import CHIPS, GIB
from jaxserve.engine.sizing import DeviceFacts, resolve
from jaxserve.planner.compiled import CompiledStep, compile_step
from jaxserve.planner.footprint import Footprint, footprint
from jaxserve.planner.models import read_model
from jaxserve.planner.roofline import StepTime, step_time
from jaxserve.planner.slices import SLICES, Slice, parse_slice, single_hosts
from jaxserve.planner.targets import abstract_mesh, compile_mesh, why_no_compiler
from jaxserve.scheduling.buckets import SchedulerConfig, buckets
from jaxserve.scheduling.plan import Bucket

SCHEMA_VERSION = 1
FAMILIES = tuple(family for family in SLICES if family != "cpu")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one device. temporaries: as compiled; None: not compiled. available: None on CPU."""

    available: int | None
    weights: int
    kv_cache: int
    state: int
    temporaries: int | None
    code: int | None

    @property
    def used(self) -> int:
        return self.weights + self.kv_cache + self.state + (self.temporaries or 0) + (self.code or 0)


@dataclass(frozen=True, slots=True)
class Speed:
    """A roofline: the least time that the published figures of the hardware allow. Never measured."""

    users: int  # that decode together
    context: int
    step: StepTime  # one token for each
    step_seconds: float
    tokens_per_second: float  # of all users together


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of the context's length, alone and not cached: the time to its first token at best."""

    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Plan:
    """What is known of a model on a slice. Fields behind reason are None where the engine refuses the slice."""

    model: str
    topology: str
    num_devices: int
    num_hosts: int
    fits: bool
    reason: str | None  # why it does not
    dtype: str | None = None
    quantization: str | None = None  # of the layers' matrices; None: dtype
    kv_dtype: str | None = None
    dp: int = 1
    tp: int = 1
    memory: Memory | None = None
    context: int | None = None  # of the users that are counted
    max_model_len: int | None = None
    kv_tokens: int | None = None  # that the cache holds, of all ranks
    users: int | None = None  # that decode together, each with the whole context
    users_limited_by: str | None = None  # "memory", or "--max-running-requests"
    alone: Speed | None = None
    full: Speed | None = None  # all users, or as many as were asked for
    prompt: Prompt | None = None
    compiled: tuple[CompiledStep, ...] = ()
    not_compiled: str | None = None  # why
    source: str | None = None  # who publishes the figures of the hardware
    smallest: Mapping[str, str | None] = field(default_factory=dict)  # family -> the smallest slice that fits
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For json.dumps; bytes, seconds and tokens. The names of the fields are those above."""
        return {"schema": SCHEMA_VERSION, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of every slice."""

    name: str
    model: ModelConfig
    engine: Mapping[str, Any]  # EngineConfig fields, as the server's flags set them
    context: int
    users: int | None

    def config(self) -> EngineConfig:
        options = dict(self.engine)
        if options.get("device", "auto") != "auto":
            raise ConfigError("--device is the topology's; leave it out")
        return EngineConfig(model_path=self.name, cache_dir="", **options)


def make_plan(
    model: str,
    topology: str,
    *,
    context: int | None = None,
    users: int | None = None,
    compile_steps: bool = True,
    engine: Mapping[str, Any] | None = None,
) -> Plan:
    """A model's name or path (planner.models) on a slice ("v6e:2x4", "h200:8", "cpu"), and the smallest that fit.

    context: tokens of each user, prompt and answer; None: 8192, or what the model has. users: that must fit; None: at
    least one. compile_steps: compile the largest steps where the compiler is installed (a minute or two).
    engine: fields of EngineConfig. Raises ConfigError for what is not known or not served.
    """
    question = ask(model, context=context, users=users, engine=engine)
    where = parse_slice(topology)
    plan = answer(question, where, compile_steps=compile_steps)
    smallest = {family: _smallest(question, family) for family in FAMILIES}
    return replace(plan, smallest=smallest)


def compare(
    model: str,
    topologies: Sequence[str] | None = None,
    *,
    context: int | None = None,
    users: int | None = None,
    engine: Mapping[str, Any] | None = None,
) -> tuple[Plan, ...]:
    """The arithmetic of make_plan for several slices; None: those of one host of every kind. Nothing is compiled."""
    question = ask(model, context=context, users=users, engine=engine)
    slices = (
        [each for family in FAMILIES for each in single_hosts(family)]
        if topologies is None
        else [parse_slice(topology) for topology in topologies]
    )
    return tuple(answer(question, where, compile_steps=False) for where in slices)


def ask(model: str, *, context: int | None, users: int | None, engine: Mapping[str, Any] | None) -> Question:
    name, config = read_model(model)
    config = config.quantized((engine or {}).get("quantization", "auto"))
    if context is not None and context > config.max_position:
        raise ConfigError(f"--context {context} is more than the model's {config.max_position} positions")
    return Question(name, config, engine or {}, context or min(8192, config.max_position), users)


def answer(question: Question, where: Slice, *, compile_steps: bool) -> Plan:
    """Arithmetic first; what does not fit by it is not compiled."""
    missing = why_no_compiler(where) if compile_steps else "only the arithmetic was asked for"
    where_to = (where.name, where.num_devices, where.num_hosts)
    plan = Plan(question.name, *where_to, fits=False, reason=None, context=question.context, not_compiled=missing)
    plan = replace(plan, source=where.chip.source)
    try:
        blueprint, sums = draw_on(where, question, to_compile=missing is None)
    except ConfigError as error:
        return replace(plan, reason=str(error))
    compiled = () if missing else tuple(_compiled(blueprint, where))
    return _counted(plan, question, where, blueprint, sums, compiled)


def draw_on(where: Slice, question: Question, *, to_compile: bool) -> tuple[Blueprint, Footprint]:
    """The engine for a slice. Raises ConfigError where it refuses the slice."""
    facts = DeviceFacts(where.chip.platform, where.num_devices, where.chip.memory, where.chip.capability)
    make_mesh = compile_mesh if to_compile else abstract_mesh
    blueprint = draw(question.model, question.config(), facts, lambda sizes: make_mesh(where, sizes))
    return blueprint, footprint(blueprint)


def _compiled(blueprint: Blueprint, where: Slice) -> list[CompiledStep]:
    return [compile_step(blueprint, bucket, where.chip.platform) for bucket in largest(blueprint)]


def largest(blueprint: Blueprint) -> list[Bucket]:
    """The step with the most decode rows, and the one with the most tokens: nothing needs more memory than these."""
    found = buckets(blueprint.sizes.scheduler)
    decode = max((each for each in found if not each.num_prefill), key=lambda each: each.num_decode)
    return [decode, max(found, key=lambda each: each.num_tokens)]


def _counted(
    plan: Plan,
    question: Question,
    where: Slice,
    blueprint: Blueprint,
    sums: Footprint,
    compiled: tuple[CompiledStep, ...],
) -> Plan:
    sizes, context = blueprint.sizes.scheduler, question.context
    by_memory, by_rows = _users(question, sizes, sums.dp)
    users = min(by_memory, by_rows)
    memory = _memory(where, sums, compiled)
    reason = _refusal(memory, compiled) or _shortage(question, sizes, users)
    shown = min(question.users or users, users)
    return replace(
        plan,
        fits=reason is None,
        reason=reason,
        dtype=blueprint.sizes.dtype,
        quantization=blueprint.shape.config.quantization,
        kv_dtype=blueprint.sizes.kv_dtype,
        dp=sums.dp,
        tp=sums.tp,
        memory=memory,
        max_model_len=sizes.max_model_len,
        kv_tokens=sums.dp * (sizes.num_pages - 1) * sizes.page_size,
        users=users,
        users_limited_by="memory" if by_memory < by_rows else "--max-running-requests",
        alone=_speed(where, blueprint, sums, 1, context),
        full=_speed(where, blueprint, sums, shown, context) if shown else None,
        prompt=_prompt(where, blueprint, sums, context),
        compiled=compiled,
        notes=blueprint.sizes.notes + _notes(where),
    )


def _notes(where: Slice) -> tuple[str, ...]:
    if where.num_hosts > 1:
        return (f"{where.name} is {where.num_hosts} hosts",)
    return ()


def _memory(where: Slice, sums: Footprint, compiled: tuple[CompiledStep, ...]) -> Memory:
    good = [step for step in compiled if step.error is None]
    return Memory(
        available=where.chip.memory,
        weights=sums.weights,
        kv_cache=sums.kv,
        state=sums.state,
        temporaries=max((step.temporaries for step in good), default=None),
        code=max((step.code for step in good), default=None),
    )


def _users(question: Question, sizes: SchedulerConfig, dp: int) -> tuple[int, int]:
    """How many the cache holds, and how many rows there are, on dp ranks."""
    per_user = -(-question.context // sizes.page_size)
    return dp * ((sizes.num_pages - 1) // per_user), dp * sizes.max_running


def _shortage(question: Question, sizes: SchedulerConfig, users: int) -> str | None:
    """What is too small for what was asked; None where nothing is."""
    if question.context > sizes.max_model_len:
        return f"the longest context is {sizes.max_model_len} tokens, less than {question.context}"
    if users < (question.users or 1):
        return f"{users} users of {question.context} tokens fit, not {question.users or 1}"
    return None


def _refusal(memory: Memory, compiled: tuple[CompiledStep, ...]) -> str | None:
    """What the compiler has against it."""
    for step in compiled:
        what = f"the step of {step.bucket.num_decode} rows and {step.bucket.num_prefill} prompt tokens"
        if step.error is not None:
            return f"{what} {'is out of memory' if step.out_of_memory else 'does not compile'}: {step.error}"
        if memory.available is not None and step.needed > memory.available:
            return f"{what} needs {step.needed / GIB:.2f} GiB of {memory.available / GIB:.2f}"
    return None


def _speed(where: Slice, blueprint: Blueprint, sums: Footprint, users: int, context: int) -> Speed:
    """The users are spread evenly over the ranks, which run side by side."""
    rows = -(-users // sums.dp)
    step = step_time(sums.decode(blueprint, rows, context), where, sums.tp)
    return Speed(users, context, step, step.total, users / step.total)


def _prompt(where: Slice, blueprint: Blueprint, sums: Footprint, context: int) -> Prompt | None:
    if where.chip.flops is None:
        return None
    work, _ = sums.prefill(blueprint, context)
    seconds = step_time(work, where, sums.tp).total
    return Prompt(seconds, context / seconds)


def _smallest(question: Question, family: str) -> str | None:
    for axes in SLICES[family]:
        where = Slice(CHIPS[family], axes)
        facts = DeviceFacts(where.chip.platform, where.num_devices, where.chip.memory, where.chip.capability)
        try:
            sizes = resolve(question.model, question.config(), facts)
        except ConfigError:
            continue
        if _shortage(question, sizes.scheduler, min(_users(question, sizes.scheduler, sizes.dp))) is None:
            return where.name
    return None
