"""Who else could have been chosen, and how sure the figures are: intervals and the line of reason.

All from `selection` of `autocomp front --json`; where it is null there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from autocomp.core.metric import Scale
from autocomp.report.figures import format_quality

_SHOWN = 6
"""Rows of the table; the trial chosen is always among them."""


def interval_text(scale: Scale, low: float | None, high: float | None) -> str:
    """`0.863 … 0.933`, a perplexity as `53.1 … 58.2`; empty where there is none."""
    if low is None or high is None:
        return ""
    low, high = scale.ends(low, high)
    if scale.reciprocal:
        return f"{low:.4g} … {high:.4g}"
    return f"{format_quality(low)} … {format_quality(high)}"


def gap_text(scale: Scale, row: Mapping[str, Any]) -> str:
    """A finalist's distance from the best, with its 95% interval; empty for the best.

    In points of a quality (`−0.3 points, 95% interval −1.1 … +0.5`), in percent of a perplexity,
    which is worse when higher.
    """
    if row["difference"] is None:
        return ""
    if not scale.reciprocal:
        value, low, high = (100 * row[f"difference{end}"] for end in ("", "_low", "_high"))
        return f"{_signed(value)} points, 95% interval {_signed(low)} … {_signed(high)}"
    if row["ratio_low"] is None:
        return ""
    value, high, low = (100 * (1 / row[f"ratio{end}"] - 1) for end in ("", "_low", "_high"))
    return f"{scale.name} {_signed(value)}%, 95% interval {_signed(low)} … {_signed(high)}%"


def _signed(value: float) -> str:
    """`+0.5`, `−1.1`, `0.0`."""
    text = f"{abs(value):.1f}"
    return text if text == "0.0" else f"{'−' if value < 0 else '+'}{text}"


def selection_line(selection: Mapping[str, Any], scale: Scale) -> str:
    """Why the trial that is chosen was: `a is within noise of b (…) and simpler: …`."""
    if selection["least"] is not None:
        cost, others = selection["least"].replace("_", " "), selection["fitting"] - 1
        if not others:
            return f"{selection['chosen']} is the only one that fits"
        return (
            f"{selection['chosen']} has the lowest {cost} of the {selection['fitting']} that fit; "
            f"{selection['best']} has the highest quality"
        )
    rows = {row["id"]: row for row in selection["finalists"]}
    chosen, best, closest = (rows[selection[name]] for name in ("chosen", "best", "closest"))
    if chosen is not best:
        within = f"{chosen['id']} is within noise of {best['id']} ({gap_text(scale, chosen)}) and "
        if chosen is closest:
            less = f"{_nats(chosen)} nats instead of {_nats(best)}"
            return f"{within}diverges less from the teacher: {less}"
        than = "" if closest is best else f" than {closest['id']}, which diverges least"
        options = f"{_options(chosen)} instead of {closest['distinct_options']}"
        return f"{within}simpler{than}: {options}"
    others = len(rows) - 1
    if not others:
        return f"{best['id']} is better than all others that fit, beyond the noise of the examples"
    return (
        f"{best['id']} is the best that fits; {others} other{'' if others == 1 else 's'} within "
        f"noise of it on {selection['examples']:,} examples"
    )


def _nats(row: Mapping[str, Any]) -> str:
    return "–" if row["teacher_kl"] is None else f"{row['teacher_kl']:.3g}"


def _options(row: Mapping[str, Any]) -> str:
    count = row["distinct_options"]
    return f"{count} distinct option{'' if count == 1 else 's'}"


def finalists_table(selection: Mapping[str, Any], scale: Scale) -> Table:
    """The best and those within noise of it, with their 95% intervals."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("finalists", no_wrap=True)
    table.add_column(scale.name, justify="right", no_wrap=True)
    table.add_column("95% interval", no_wrap=True)
    table.add_column("to the best", no_wrap=True)
    table.add_column("KL", justify="right", no_wrap=True)
    table.add_column("options", justify="right", no_wrap=True)
    for row in _shown(selection):
        chosen = row["id"] == selection["chosen"]
        figure = scale.value(row["quality"])
        table.add_row(
            "▸" if chosen else "",
            str(row["id"]),
            f"{figure:.4g}" if scale.reciprocal else format_quality(figure),
            interval_text(scale, row["quality_low"], row["quality_high"]),
            gap_text(scale, row).replace(" 95% interval", "").removeprefix(f"{scale.name} "),
            _nats(row),
            str(row["distinct_options"]),
            style="bold green" if chosen else "",
        )
    if (more := len(selection["finalists"]) - len(_shown(selection))) > 0:
        table.add_row("", f"and {more} more", style="dim")
    return table


def _shown(selection: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    rows = list(selection["finalists"])
    chosen = next(index for index, row in enumerate(rows) if row["id"] == selection["chosen"])
    return rows[:_SHOWN] if chosen < _SHOWN else [*rows[: _SHOWN - 1], rows[chosen]]


def finalists_note(selection: Mapping[str, Any]) -> str:
    """What the table's figures are."""
    return (
        f"intervals: 95%, paired bootstrap of {selection['examples']:,} examples  "
        f"options: distinct ones"
    )
