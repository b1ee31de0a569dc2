"""The tables of the rivals' benchmarks."""

from __future__ import annotations

from benchmarks.rivals import CHOSEN, DENSE, WAYS, Match

Figures = dict[str, float]


def rivals(match: Match, metric: str, figures: Figures) -> list[list[str]]:
    """A row per model: costs, the metric on both splits, and the share of the teacher's."""
    head = [
        "model",
        "latency, %",
        "size, %",
        "budget",
        "latency, ms",
        "size, MB",
        "KL to the teacher, nats",
        f"{metric}, search split",
        f"{metric}, report split",
        "of the teacher's, %",
        "95% interval",
    ]
    rows = [head]
    for name in (DENSE, *match.recipes, CHOSEN):
        found = f"**autocomp search**, {figures['search_minutes']:.0f} min"
        label = found if name == CHOSEN else name
        ends = () if name == DENSE else ("low", "high")
        interval = [_cell(figures, f"{name}_report_{end}", ".1f") for end in ends] or ["–"]
        rows.append(
            [
                label,
                _cell(figures, f"{name}_latency", ".1f"),
                _cell(figures, f"{name}_size", ".1f"),
                _met(figures, name),
                _cell(figures, f"{name}_latency_ms", ".3g"),
                _cell(figures, f"{name}_size_mb", ".3g"),
                _cell(figures, f"{name}_kl", ".3f"),
                _cell(figures, f"{name}_quality", ".4g"),
                _cell(figures, f"{name}_report_quality", ".4g"),
                _cell(figures, f"{name}_report", ".1f"),
                "–" if "–" in interval else " … ".join(interval),
            ]
        )
    return rows


def proposals(figures: Figures) -> list[list[str]]:
    """A row per way of proposing that the search used: what came of its trials."""
    rows = [["proposed by", "trials", "trained to the end", "on the front", "least KL", "chosen"]]
    for way in WAYS:
        if f"by_{way}_trials" in figures:
            counts = [
                _cell(figures, f"by_{way}_{of}", ".0f") for of in ("trials", "whole", "front")
            ]
            chosen = "yes" if figures[f"by_{way}_chosen"] else ""
            rows.append([way, *counts, _cell(figures, f"by_{way}_kl", ".3f"), chosen])
    return rows


def _met(figures: Figures, name: str) -> str:
    """As the search holds it: to the last digit."""
    keys = [(f"{name}_{cost}", f"{cost}_limit") for cost in ("latency", "size")]
    if name == DENSE or any(key not in figures for key, _ in keys):
        return "–"
    return "met" if all(figures[key] <= figures[limit] for key, limit in keys) else "over"


def _cell(figures: Figures, key: str, form: str) -> str:
    return format(figures[key], form) if key in figures else "–"
