"""How figures are written in tables: a value with its share of dense, one spelling everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from autocomp.core.budget import Budget
from autocomp.core.measurement import Measurement, latency_clock
from autocomp.core.metric import Scale
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
        if metric and quality is not None
    }
    return names.pop() if len(names) == 1 else "quality"


def format_metric(quality: float | None, metric: Mapping[str, Any], name: str) -> str:
    """The figure for a column called `name` by `quality_name`: the metric's own, or the quality."""
    if name == "quality" or not metric or quality is None:
        return format_quality(quality)
    return f"{metric['value']:.4g}"


def view_scale(view: Mapping[str, Any]) -> Scale:
    """What the qualities of a `front --json` mapping are drawn and limited on."""
    return Scale.of((trial.get("metric") or {}, trial["quality"]) for trial in view["trials"])


def view_budget(view: Mapping[str, Any]) -> Budget:
    """The limits of a `front --json` mapping."""
    return Budget(**{name: view["budget"].get(name) for name in (*COSTS, "quality")})


def missed(trial: Mapping[str, Any], budget: Budget) -> dict[str, float]:
    """Limits that a measured trial of a `front --json` mapping misses, and by how much."""
    cost = Measurement("measured", *(trial[name] for name in COSTS))
    return {k: v for k, v in budget.excess(cost, trial["quality"]).items() if v > 0}


def verdict(trial: Mapping[str, Any], budget: Budget) -> str:
    """`met`; `over` a limit on cost; `below` the floor on quality alone; `–` if unmeasured.

    Empty for dense, which the limits refer to.
    """
    if not trial["measured"]:
        return "–"
    if trial["kind"] == "dense":
        return ""
    if trial["feasible"]:
        return "met"
    return "below" if list(missed(trial, budget)) == ["quality"] else "over"


def latency_note(target: Mapping[str, Any]) -> str:
    """What the latencies of a target's workload are, in words; empty where it does not say."""
    threads = (target.get("workload") or {}).get("threads")
    if threads is None:
        return ""
    if latency_clock(threads) == "processor":
        clock = "processor time of its one thread"
    else:
        clock = f"wall-clock time on {threads} threads"
    return f"{clock}, normalised by an anchor model run in between"


def shown_figure(trial: Mapping[str, Any], measure: str) -> float | None:
    """The figure of a column called `measure` by `quality_name`, as a number."""
    metric = trial.get("metric") or {}
    figure: float | None = trial["quality"]
    return figure if measure == "quality" or figure is None else metric.get("value", figure)


def _differs(metric: Mapping[str, Any], quality: float) -> bool:
    """Whether a metric in its own sense is another number than the quality made of it."""
    value = metric.get("value")
    return isinstance(value, int | float) and value != quality


def format_excess(excess: Mapping[str, float], scale: Scale | None = None) -> str:
    """`latency +12%, size ×2.3, quality −2%`; `unmeasured` where the overshoot is infinite.

    With a scale whose metric is better when lower, the shortfall in quality is its overshoot.
    """
    parts = []
    for name, value in excess.items():
        if value == float("inf"):
            parts.append(f"{COST_NAMES[name]} unmeasured")
        elif name == "quality" and not (scale and scale.reciprocal and value < 1):
            parts.append(f"quality −{max(100 * value, 0.1):.2g}%")
        elif name == "quality" and scale is not None:
            parts.append(f"{scale.name} {_over(value / (1 - value))}")
        else:
            parts.append(f"{COST_NAMES[name]} {_over(value)}")
    return ", ".join(parts)


def _over(value: float) -> str:
    """`+12%`, `×2.3`."""
    return f"+{max(100 * value, 0.1):.2g}%" if value < 0.995 else f"×{1 + value:.2g}"


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
