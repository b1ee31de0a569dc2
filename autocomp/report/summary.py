"""A candidate and a trial in a few figures: mean bits, what was removed, what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from autocomp.core.candidate import Option
from autocomp.core.metric import Scale
from autocomp.core.unit import Unit
from autocomp.front.noise import Interval
from autocomp.operators import option_formats
from autocomp.report.figures import quality_name
from autocomp.study.records import TrialRecord

_DENSE_BITS = 32
_THINNING = ("groups", "rank", "vocabulary")


def candidate_figures(
    candidate: Mapping[str, Any], units: Iterable[Unit] | None = None
) -> dict[str, float | int | str]:
    """Few figures that tell candidates apart, for tables, tooltips and MLflow parameters.

    Args:
        candidate: as `Candidate.to_json` gives it.
        units: the model's units. With them means are weighted by parameters and shares of heads,
            of width and of all weights are given; without, units count equally.

    Returns:
        `mean_bits` over the units that remain; `skipped_units`; where there are any,
        `mean_sparsity` (share of zeros among the weights that remain) and `replaced_units` (a mixer
        stands in for attention); with `units` also `removed_share` (of all weights, by structure),
        `heads_kept`, `width_kept` (shares, a skipped unit keeps 0); `tokens`, and when there are
        any `lr`, `temperature`, `loss`; `runtime` where the study has a choice.
    """
    known = {unit.name: unit for unit in units or ()}
    bits_sum = weight_sum = zeros = removed = total = 0.0
    skipped = replaced = 0
    kept: dict[str, list[float]] = {"heads": [], "width": []}
    for name, option in candidate["units"].items():
        unit = known.get(name)
        weight = float(unit.parameters) if unit is not None else 1.0
        share = _kept_share(option, unit, kept)
        total += weight
        removed += weight * (1.0 - share)
        replaced += "replace" in option
        if "skip" in option:
            skipped += 1
            continue
        bits_sum += weight * share * weight_bits(option)
        weight_sum += weight * share
        zeros += weight * share * sparsity(option)
    figures: dict[str, float | int | str] = {}
    if weight_sum:
        figures["mean_bits"] = round(bits_sum / weight_sum, 3)
    if zeros:
        figures["mean_sparsity"] = round(zeros / weight_sum, 4)
    figures["skipped_units"] = skipped
    if replaced:
        figures["replaced_units"] = replaced
    if known and total:
        figures["removed_share"] = round(removed / total, 4)
        for axis, shares in kept.items():
            if shares:
                figures[f"{axis}_kept"] = round(sum(shares) / len(shares), 4)
    figures.update(candidate.get("distillation", {}))
    if candidate.get("runtime") is not None:
        figures["runtime"] = candidate["runtime"]
    return figures


def weight_bits(option: Mapping[str, Mapping[str, Any]]) -> int:
    """Bits a unit's weights are left with; 32 when no step quantises them."""
    for args in option.values():
        bits = args.get("weights")
        if isinstance(bits, int):
            return bits
    return _DENSE_BITS


def sparsity(option: Mapping[str, Mapping[str, Any]]) -> float:
    """The share of zeros among a unit's weights."""
    for args in option.values():
        level = args.get("level")
        if isinstance(level, str):
            kept, _, group = level.partition(":")
            return 1.0 - int(kept) / int(group)
        if level is not None:
            return float(level)
    return 0.0


def _kept_share(
    option: Mapping[str, Mapping[str, Any]], unit: Unit | None, kept: dict[str, list[float]]
) -> float:
    """The share of the unit's heads or width that remains; noted in `kept`."""
    whole = {"heads": None, "width": None} if unit is None else _whole(unit)
    share = 0.0 if "skip" in option else 1.0
    for axis, full in whole.items():
        if full is None:
            continue
        if axis in option and share:
            share = float(option[axis]["keep"]) / full
        kept[axis].append(share)
    return share * _thinned(option, unit) if share else 0.0


def _thinned(option: Mapping[str, Mapping[str, Any]], unit: Unit | None) -> float:
    """The share of the unit's weights that low rank, pooling or a pruned vocabulary leaves."""
    steps = {name: args for name, args in option.items() if name in _THINNING}
    if unit is None or not steps:
        return float(steps.get("rank", {}).get("ratio", 1.0))
    left = option_formats(unit, Option.from_json(steps)).values()
    whole = sum(site.rows * site.columns for site in unit.sites)
    return sum(one.rows * one.columns for one in left) / whole


def _whole(unit: Unit) -> dict[str, int | None]:
    """Heads (key-value groups under GQA) and width that `keep` counts against."""
    groups = unit.kv_heads if unit.kv_heads not in (None, unit.heads) else unit.heads
    return {"heads": groups, "width": unit.width}


def figures_text(figures: Mapping[str, float | int | str]) -> str:
    """`mean 6.1 bits · 2 units skipped · 80,000 tokens at lr 3e-04, temperature 2`."""
    parts = []
    if "mean_bits" in figures:
        parts.append(f"mean {figures['mean_bits']:.3g} bits")
    if "mean_sparsity" in figures:
        parts.append(f"{100 * float(figures['mean_sparsity']):.0f}% zeros")
    if figures.get("skipped_units"):
        count = figures["skipped_units"]
        parts.append(f"{count} unit{'' if count == 1 else 's'} skipped")
    if "replaced_units" in figures:
        parts.append(f"attention replaced in {figures['replaced_units']}")
    if figures.get("removed_share"):
        parts.append(f"{100 * float(figures['removed_share']):.0f}% of weights removed")
    tokens, loss = figures.get("tokens"), figures.get("loss", "logits")
    if tokens:
        parts.append(
            f"{tokens:,} tokens at lr {figures.get('lr', 0):.2g}, "
            f"temperature {figures.get('temperature', 1):g}"
            + ("" if loss == "logits" else f", loss {loss}")
        )
    elif tokens == 0:
        parts.append("not distilled")
    if "runtime" in figures:
        parts.append(f"on {figures['runtime']}")
    return " · ".join(parts)


def trial_metrics(record: TrialRecord, interval: Interval | None = None) -> dict[str, float | None]:
    """A trial's figures, units in their names; what was not measured is `None`.

    Quality goes by the name and in the sense of the task's metric where that is another figure, as
    do the ends of its 95% `interval`: `quality_low` and `quality_high`, or `perplexity_low` and so
    on.
    """
    metrics: dict[str, float | None] = {"teacher_kl": record.teacher_kl}
    if interval is not None:
        scale = Scale.of([(record.metric, record.quality)])
        low, high = scale.ends(interval.low, interval.high)
        metrics |= {f"{scale.name}_low": low, f"{scale.name}_high": high}
    name, value = record.metric.get("name"), record.metric.get("value")
    if quality_name([record.metric], [record.quality]) == "quality":
        metrics["quality"] = record.quality
    if name and isinstance(value, int | float):
        metrics[str(name)] = float(value)
    for prefix, cost in (("", record.measured), ("estimated_", record.estimated)):
        if cost is not None:
            metrics[f"{prefix}latency_ms"] = cost.latency_ms
            metrics[f"{prefix}size_bytes"] = cost.size_bytes
            metrics[f"{prefix}peak_memory_bytes"] = cost.peak_memory_bytes
    if record.measured is not None:
        metrics["latency_wall_ms"] = record.measured.latency_wall_ms
        metrics["latency_spread"] = record.measured.latency_spread
        if record.measured.prefill_ms is not None:
            metrics["prefill_ms"] = record.measured.prefill_ms
    metrics.update({f"seconds_{phase}": value for phase, value in record.seconds.items()})
    return metrics
