"""Replies of a load -> figures by the key names of `vllm bench serve`, and tables that fit 80 columns.

TTFT: request sent to first text. ITL: between two pieces of text. TPOT: (end - first) / (output tokens - 1). E2E:
request sent to end.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from math import floor
from typing import Any

from jaxserve.terminal.load import Load, Reply

PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """values -> linear interpolation between the two nearest ranks, as numpy's default; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    values = [1000 * s for s in seconds]
    mean = sum(values) / len(values) if values else 0.0
    deviation = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5 if values else 0.0
    shown = {f"mean_{name}_ms": mean, f"median_{name}_ms": percentile(values, 50), f"std_{name}_ms": deviation}
    return shown | {f"p{p}_{name}_ms": percentile(values, p) for p in PERCENTILES}


def summarise(load: Load, replies: Sequence[Reply], duration: float) -> dict[str, Any]:
    """-> the result with the key names of `vllm bench serve`; throughputs per second, latencies in ms, failures left
    out.
    """
    good = [r for r in replies if r.error is None]
    prompt_tokens, output_tokens = sum(r.prompt_tokens for r in good), sum(r.output_tokens for r in good)
    rate = load.request_rate
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat" if load.chat else "openai",
        "model_id": load.model,
        "num_prompts": len(replies),
        "request_rate": "inf" if rate == float("inf") else rate,
        "max_concurrency": load.max_concurrency,
        "duration": duration,
        "completed": len(good),
        "failed": len(replies) - len(good),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(good) / duration,
        "output_throughput": output_tokens / duration,
        "total_token_throughput": (prompt_tokens + output_tokens) / duration,
    }
    result |= _spread("ttft", [r.text_times[0] - r.start for r in good])
    tpot = [(r.text_times[-1] - r.text_times[0]) / (r.output_tokens - 1) for r in good if r.output_tokens > 1]
    result |= _spread("tpot", tpot)
    result |= _spread("itl", [b - a for r in good for a, b in zip(r.text_times, r.text_times[1:], strict=False)])
    result |= _spread("e2el", [r.end - r.start for r in good])
    result["errors"] = sorted({r.error for r in replies if r.error})
    return result


def table(result: dict[str, Any]) -> str:
    """-> a table that fits 80 columns."""
    counts = [
        ("completed / failed", f"{result['completed']} / {result['failed']}"),
        ("seconds", f"{result['duration']:.2f}"),
        ("input / output tokens", f"{result['total_input_tokens']} / {result['total_output_tokens']}"),
        ("requests/s", f"{result['request_throughput']:.2f}"),
        ("output tokens/s", f"{result['output_throughput']:.1f}"),
        ("all tokens/s", f"{result['total_token_throughput']:.1f}"),
    ]
    lines = [f"{name:<24}{value:>20}" for name, value in counts]
    lines += ["", f"{'ms':<24}" + "".join(f"{head:>11}" for head in ("mean", "p50", "p90", "p99"))]
    for key, name in (
        ("ttft", "first token"),
        ("tpot", "per later token"),
        ("itl", "between"),
        ("e2el", "whole answer"),
    ):
        values = [result[f"{stat}_{key}_ms"] for stat in ("mean", "median", "p90", "p99")]
        lines.append(f"{name + ' (' + key.upper() + ')':<24}" + "".join(f"{value:>11.2f}" for value in values))
    lines += [f"error: {error}"[:80] for error in result["errors"][:5]]
    return "\n".join(lines)


def comparison(results: Sequence[dict[str, Any]]) -> str:
    """-> one row for each run; latencies in ms."""
    heads = ("at once", "req/s", "tokens/s", "TTFT p50", "p99", "TPOT p50", "p99", "failed")
    rows = [heads] + [
        (
            str(result["max_concurrency"]),
            f"{result['request_throughput']:.2f}",
            f"{result['output_throughput']:.1f}",
            f"{result['median_ttft_ms']:.1f}",
            f"{result['p99_ttft_ms']:.1f}",
            f"{result['median_tpot_ms']:.2f}",
            f"{result['p99_tpot_ms']:.2f}",
            str(result["failed"]),
        )
        for result in results
    ]
    lines = ["".join(f"{cell:>{10 if cell_number else 8}}" for cell_number, cell in enumerate(row)) for row in rows]
    errors = sorted({error for result in results for error in result["errors"]})
    return "\n".join(["latencies in ms", *lines, *(f"error: {error}"[:80] for error in errors[:5])])
