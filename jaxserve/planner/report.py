"""Plans as text of at most 80 columns."""

import textwrap
from collections.abc import Sequence

from jaxserve.planner.plan import Plan, Speed

WIDTH = 80
NOT_MEASURED = "at best, from published figures of the hardware; not measured"


def describe(plan: Plan) -> str:
    """One plan, for people."""
    lines = [f"{plan.model} on {plan.topology}, {_count(plan.num_devices, 'device')}: {_verdict(plan)}"]
    if plan.reason:
        lines += _wrapped(plan.reason)
    if plan.memory is not None:
        lines += ["", *_memory(plan), "", *_room(plan), "", *_speeds(plan)]
    lines += ["", *_compiled(plan)]
    if plan.smallest:
        found = [name for name in plan.smallest.values() if name]
        lines += ["", *_wrapped("Smallest that fit: " + (", ".join(found) or "none") + ".")]
    for note in plan.notes:
        lines += _wrapped(f"Note: {note}.")
    return "\n".join(lines)


def table(plans: Sequence[Plan]) -> str:
    """Several plans, one a line."""
    context = next((plan.context for plan in plans if plan.context), None)
    head = "topology     devices  weights   KV tokens  users  ms/step  tokens/s    alone"
    lines = [head, "-" * len(head)]
    for plan in plans:
        if plan.memory is None or plan.full is None or plan.alone is None or not plan.fits:
            lines.append(f"{plan.topology:<12}{plan.num_devices:>8}   does not fit")
            continue
        lines.append(
            f"{plan.topology:<12}{plan.num_devices:>8}{_bytes(plan.memory.weights):>9}{plan.kv_tokens or 0:>12,}"
            f"{plan.users or 0:>7}{plan.full.step_seconds * 1e3:>9.1f}{plan.full.tokens_per_second:>10,.0f}"
            f"{plan.alone.tokens_per_second:>9,.0f}"
        )
    explained = (
        f"weights: of each device. users: that decode together, {context} tokens each. alone: tokens/s of one such "
        f"user. Times are {NOT_MEASURED}."
    )
    lines += ["", *_wrapped(explained, 0)]
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    how = "as compiled" if plan.compiled else "by arithmetic"
    return f"fits ({how})" if plan.fits else f"does not fit ({how})"


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    assert memory is not None
    rows = [("weights", memory.weights), ("KV cache", memory.kv_cache), ("sampling state", memory.state)]
    if memory.temporaries is not None:
        rows += [("temporaries", memory.temporaries), ("programs", memory.code or 0)]
    lines = ["Memory of each device"]
    lines += [f"  {name:<22}{_bytes(size):>12}" for name, size in rows]
    if memory.available is not None:
        lines.append(f"  {'left':<22}{_bytes(memory.available - memory.used):>12}")
        lines.append(f"  {'in all':<22}{_bytes(memory.available):>12}")
    return lines


def _room(plan: Plan) -> list[str]:
    small = f", weights {plan.quantization}" if plan.quantization else ""
    small += f", cache {plan.kv_dtype}" if plan.kv_dtype != plan.dtype else ""
    shape = f"{plan.dtype}{small}, tensor parallel {plan.tp}" + (f", {plan.dp} ranks" if plan.dp > 1 else "")
    return [
        f"Room ({shape})",
        f"  {'KV cache':<22}{plan.kv_tokens or 0:>12,} tokens",
        f"  {'longest context':<22}{plan.max_model_len or 0:>12,} tokens",
        f"  {f'users of {plan.context} tokens':<22}{plan.users or 0:>12,} (limited by {plan.users_limited_by})",
    ]


def _speeds(plan: Plan) -> list[str]:
    lines = [f"Speed {NOT_MEASURED}"]
    for speed in (plan.alone, plan.full):
        if speed is not None and (speed is plan.alone or speed.users > 1):
            lines.append(_speed(speed))
    if plan.prompt is not None:
        lines.append(
            f"  {f'a prompt of {plan.context}':<22}{plan.prompt.seconds * 1e3:>9,.0f} ms"
            f"{plan.prompt.tokens_per_second:>10,.0f} tokens/s"
        )
    return lines + _wrapped(f"Figures of the hardware: {plan.source}.")


def _speed(speed: Speed) -> str:
    who = "one user" if speed.users == 1 else f"{speed.users} users"
    parts = f"memory {speed.step.memory * 1e3:.2f}, products {speed.step.compute * 1e3:.2f}"
    if speed.step.exchange:
        parts += f", exchange {speed.step.exchange * 1e3:.2f}"
    return f"  {who:<22}{speed.step_seconds * 1e3:>9.2f} ms{speed.tokens_per_second:>10,.0f} tokens/s\n    ({parts} ms)"


def _compiled(plan: Plan) -> list[str]:
    if plan.not_compiled:
        return _wrapped(f"Not compiled: {plan.not_compiled}.")
    if not plan.compiled:
        return ["Not compiled."]
    lines = ["Compiled (largest steps)"]
    for step in plan.compiled:
        rows, tokens = step.bucket.num_decode, step.bucket.num_prefill
        what = f"{rows} rows" + (f" + {tokens} prompt tokens" if tokens else "")
        if step.error:
            lines += _wrapped(f"{what}: {step.error}")
            continue
        lines.append(f"  {what:<32}{step.seconds:>6.0f} s  temporaries {_bytes(step.temporaries)}")
        if step.collectives:
            lines += _wrapped("exchanges: " + ", ".join(f"{n} {kind}" for kind, n in step.collectives.items()), 4)
    return lines


def _wrapped(text: str, indent: int = 2) -> list[str]:
    pad = " " * indent
    return textwrap.wrap(text, WIDTH, initial_indent=pad, subsequent_indent=pad)


def _bytes(size: int) -> str:
    if abs(size) >= 2**30:
        return f"{size / 2**30:.2f}G"
    return f"{size / 2**20:.0f}M"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
