"""The tables of the comparison of searches. Needs nothing but figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.search_quality.enumerated import FRONT_EVALUATIONS, SPREAD
from benchmarks.search_quality.large import CASES, EVALUATIONS, LIMITS
from benchmarks.search_quality.methods import METHODS, OURS, STOCK
from benchmarks.search_quality.problem import METRICS

Figures = dict[str, float]
NONE = "–"
_LABELS = {"latency_ms": "latency", "size_bytes": "size"}


def enumerated(figures: Figures) -> list[list[str]]:
    """A row per limit: evaluations to the optimum by method; then the goals; then fronts."""
    ratios = ["of the space, %", "best stock / ours", "best of all others / ours"]
    head = ["evaluations, median (quartiles)", *(label for label, _ in METHODS.values()), *ratios]
    rows = [head]
    for metric in METRICS:
        for at in range(len(SPREAD)):
            name = f"{metric}_{at}"
            limit = f"{figures[f'{name}_limit_percent']:.0f}% of dense"
            meet = f"{figures[f'{name}_fits_percent']:.2g}%"
            label = f"{_LABELS[metric]} ≤ {limit}, which {meet} meet"
            cells = [_evaluations(figures, f"{name}_{method}") for method in METHODS]
            others = [method for method in METHODS if method not in OURS]
            share = _ratio(figures[f"{name}_share_percent"])
            least = _at_least(figures, name, STOCK) + _ratio(figures[f"{name}_ratio"])
            repaired = _at_least(figures, name, others) + _ratio(figures[f"{name}_ratio_repaired"])
            rows.append([label, *cells, share, least, repaired])
    blank = [NONE] * len(METHODS)
    for label, *keys in (
        ("**median of the rows** (goals: ≤ 0.2%, ≥ 5)", "median_share_percent", "median_ratio"),
        ("worst of the rows", "worst_share_percent", "worst_ratio"),
    ):
        rows.append([label, *blank, *(_ratio(figures[key]) for key in keys)])
    rows[-2].append(_ratio(figures["median_ratio_repaired"]))
    rows[-1].append(NONE)
    for figure, what in (
        ("hypervolume_percent", "hypervolume, % of the true front's"),
        ("igd", "IGD+ to the true front"),
    ):
        for count in FRONT_EVALUATIONS:
            keys = [f"front_{count}_{method}_{figure}" for method in METHODS]
            cells = [f"{figures[key]:.3g}" if key in figures else NONE for key in keys]
            rows.append([f"KL and size after {count}: {what}", *cells, *[NONE] * len(ratios)])
    return rows


def large(figures: Figures) -> list[list[str]]:
    """A row per model and limit: regret by method after each number of evaluations."""
    counts = " / ".join(map(str, EVALUATIONS))
    labels = {"later": "ours, another limit", **{name: one for name, (one, _) in METHODS.items()}}
    order = ["ours", "later", *(name for name in METHODS if name != "ours")]
    rows = [[f"regret, %, after {counts} evaluations", *(labels[name] for name in order)]]
    for model in CASES:
        for limit, share in LIMITS.items():
            counts_of = [figures[f"{model}_{what}"] for what in ("dimensions", "options", "scores")]
            dimensions, options, scores = (f"{count:,.0f}" for count in counts_of)
            label = f"{model}, {dimensions} dimensions, {100 * share:.0f}% of the bytes"
            cells = []
            for method in order:
                keys = [f"{model}_{limit}_{method}_{count}" for count in EVALUATIONS]
                cells.append(" / ".join(_percent(figures, key) for key in keys))
            rows.append([f"{label} ({scores} of {options} options scored)", *cells])
    return rows


def _evaluations(figures: Figures, name: str) -> str:
    low, mid, high = (figures[f"{name}_{key}"] for key in ("low", "median", "high"))
    return f"{_count(figures, mid)} ({_count(figures, low)}–{_count(figures, high)})"


def _at_least(figures: Figures, name: str, methods: Sequence[str]) -> str:
    """A sign before a ratio whose better side is only known not to have got there."""
    given_up = all(figures[f"{name}_{method}_median"] > figures["most"] for method in methods)
    return "≥ " if given_up else ""


def _count(figures: Figures, value: float) -> str:
    most = figures["most"]
    return f"> {most:.0f}" if value > most else f"{value:.0f}"


def _ratio(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _percent(figures: Figures, key: str) -> str:
    value = figures.get(key, math.inf)
    return NONE if math.isinf(value) else f"{value:.3g}"
