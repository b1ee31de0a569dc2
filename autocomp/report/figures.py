"""How figures are written in tables: a value with its share of dense, one spelling everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from autocomp.core.quantities import format_bytes, format_ms

COSTS = ("latency_ms", "size_bytes", "peak_memory_bytes")
COST_NAMES = {
    "latency_ms": "latency",
    "size_bytes": "size",
    "peak_memory_bytes": "peak memory",
    "quality": "quality",
}


def format_cost(name: str, value: float | None) -> str:
    """A latency in ms, a size in bytes; `–` for `None`."""
    return format_ms(value) if name == "latency_ms" else format_bytes(value)


def format_share(value: float | None, dense: float | None) -> str:
    """`18%`, `3.2%`; empty when either is missing."""
    if value is None or not dense:
        return ""
    percent = 100 * value / dense
    return f"{percent:.1f}%" if percent < 10 else f"{percent:.0f}%"


def format_quality(value: float | None) -> str:
    """Three decimals, four significant digits for small values; `–` for `None`."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) >= 0.1 or value == 0 else f"{value:#.4g}"


def quality_name(metrics: Iterable[Mapping[str, Any]], qualities: Iterable[float | None]) -> str:
    """What a column of qualities is called: `perplexity` where the metric is another figure.

    Both are those of the same trials, in the same order; a trial without a metric says nothing.
    """
    names = {
        str(metric["name"]) if _differs(metric, quality) else "quality"
        for metric, quality in zip(metrics, qualities, strict=True)
        if metric
    }
    return names.pop() if len(names) == 1 else "quality"


def format_metric(quality: float | None, metric: Mapping[str, Any], name: str) -> str:
    """The figure for a column called `name` by `quality_name`: the metric's own, or the quality."""
    if name == "quality" or not metric:
        return format_quality(quality)
    return f"{metric['value']:.4g}"


def _differs(metric: Mapping[str, Any], quality: float | None) -> bool:
    """Whether a metric in its own sense is another number than the quality made of it."""
    value = metric.get("value")
    return isinstance(value, int | float) and value != quality and quality is not None


def format_excess(excess: Mapping[str, float]) -> str:
    """`latency +12%, size ×2.3, quality −0.02`; `unmeasured` where the overshoot is infinite."""
    parts = []
    for name, value in excess.items():
        if value == float("inf"):
            parts.append(f"{COST_NAMES[name]} unmeasured")
        elif name == "quality":
            parts.append(f"quality −{value:.3g}")
        else:
            over = f"+{max(100 * value, 0.1):.2g}%" if value < 0.995 else f"×{1 + value:.2g}"
            parts.append(f"{COST_NAMES[name]} {over}")
    return ", ".join(parts)


def summarise_option(option: Mapping[str, Mapping[str, Any]]) -> str:
    """`heads 6 + gptq w4 a8 g32`, `skip`, `dense`: one unit's option, short."""
    return " + ".join(_summarise_step(name, args) for name, args in option.items()) or "dense"


def _summarise_step(operator: str, args: Mapping[str, Any]) -> str:
    """Bits as `w8`, `a8`, `g32`, left out where they say float or one group per row.

    A replacement goes by its mixer's name.
    """
    rest = dict(args)
    words = [str(rest.pop("mixer", operator))]
    if "keep" in rest:
        words.append(str(rest.pop("keep")))
    for name in ("weights", "activations", "group"):
        value = rest.pop(name, None)
        if value and (name == "group" or value not in (32, "dense")):
            words.append(f"{name[0]}{value}")
    return " ".join([*words, *(f"{name}={value}" for name, value in rest.items())])
