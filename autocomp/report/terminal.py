"""Tables for the terminal: a study's front, what `check` found, lists of extensions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from autocomp.core.metric import Scale
from autocomp.core.quantities import format_limit
from autocomp.front.pick import FIELDS
from autocomp.report.figures import (
    COSTS,
    format_cost,
    format_metric,
    format_quality,
    format_share,
    latency_note,
    quality_name,
    verdict,
    view_budget,
    view_scale,
)
from autocomp.report.finalists import finalists_note, finalists_table, selection_line


def print_front(console: Console, view: Mapping[str, Any], *, estimated: bool = False) -> None:
    """`front_table`, then what to do next; commands stay on one line, ready to paste."""
    console.print(front_table(view, estimated=estimated))
    console.print()
    for line in next_steps(view):
        console.print(line, soft_wrap=True)


def front_table(view: Mapping[str, Any], *, estimated: bool = False) -> RenderableType:
    """The front as `autocomp front` shows it.

    Args:
        view: the `front --json` mapping.
        estimated: add a second table with what the cost table predicted; predicted and measured
            figures never share a column.
    """
    trials = list(view["trials"])
    dense = next((trial for trial in trials if trial["id"] == view.get("dense")), None)
    failed = [trial for trial in trials if trial["state"] == "failed"]
    stopped = [trial for trial in trials if trial["state"] == "pruned"]
    shown = sorted((t for t in trials if t["state"] not in ("failed", "pruned")), key=_order)
    parts: list[RenderableType] = [_heading(view), Text(), _measured(view, shown, dense)]
    selection, report = view.get("selection"), view.get("report")
    if selection is not None:
        scale = view_scale(view)
        parts += [Text(), finalists_table(selection, scale), Text(selection_line(selection, scale))]
    if report is not None:
        parts.append(Text(report_line(report)))
    if stopped:
        word = "trial" if len(stopped) == 1 else "trials"
        text = f"{len(stopped)} {word} stopped at a rung, where others were better (see --json)"
        parts.append(Text(text, "dim"))
    if failed:
        word = "trial" if len(failed) == 1 else "trials"
        parts.append(Text(f"{len(failed)} {word} failed.", style="red"))
    parts.append(
        Text(
            "▸ chosen  ● on the front  by: what proposed it  memory: peak, of a process that only "
            "runs it",
            "dim",
        )
    )
    if selection is not None:
        parts.append(Text(finalists_note(selection), "dim"))
    if note := latency_note(view.get("target") or {}):
        parts.append(Text(f"latency: {note}", "dim"))
    if view["budget"].get("quality") is not None:
        parts.append(
            Text("budget: over a limit on cost, or below the floor on quality alone", "dim")
        )
    if estimated:
        parts += [Text(), _estimated(shown)]
    return Group(*parts)


def report_line(report: Mapping[str, Any]) -> str:
    """`t-3 on the report split: accuracy 0.895, teacher 0.902: 99.2%`; after the trials' table.

    The ratio is of qualities, so that more is better for every metric.
    """
    parts = []
    for whose, metric, quality in (
        ("", report["metric"], report["quality"]),
        ("teacher ", report["teacher_metric"], report["teacher_quality"]),
    ):
        name, value = metric.get("name", "quality"), metric.get("value", quality)
        parts.append(f"{whose or f'{name} '}{_metric(value)}")
    line = f"{report['id']} on the report split: {', '.join(parts)}"
    if report["ratio"] is not None:
        line += f"; quality {100 * report['ratio']:.1f}% of the teacher's"
        if report.get("ratio_low") is not None:
            line += (
                f" (95% interval {100 * report['ratio_low']:.1f} … "
                f"{100 * report['ratio_high']:.1f}%)"
            )
    if (report.get("candidates") or 1) > 1:
        line += f"; {report['candidates']} candidates were looked at there"
    return line


def _metric(value: float) -> str:
    """Three decimals of a share, four digits of anything larger (a perplexity)."""
    return f"{value:.4g}" if value > 1 else format_quality(value)


def _order(trial: Mapping[str, Any]) -> tuple[int, float, str]:
    """Dense, uniform baselines, then the search's, each from slow to fast."""
    kind = {"dense": 0, "uniform": 1}.get(trial["kind"], 2)
    return (kind, -(trial["latency_ms"] or 0.0), trial["id"])


def _heading(view: Mapping[str, Any]) -> Text:
    budget = view_budget(view).describe(view_scale(view))
    text = Text.assemble((str(view["study"]), "bold"))
    target = describe_target(view.get("target") or {})
    if target:
        text.append(f"  {target}", style="dim")
    text.append("\nbudget  ", style="dim").append(budget, style="yellow")
    if view.get("hypervolume") is not None:
        text.append(f"   hypervolume {view['hypervolume']:.4g}", style="dim")
    other = view.get("against")
    if other is not None and other["ratio"] is not None:
        text.append(f"\nagainst {other['study']}: ", style="dim")
        text.append(f"{other['ratio']:.3f}", style="bold")
        text.append(
            f" of its hypervolume ({other['hypervolume']:.4g}); this front covers "
            f"{other['covers']:.0%} of that one's trials, that one {other['covered']:.0%} of these",
            style="dim",
        )
    return text


def describe_target(target: Mapping[str, Any]) -> str:
    """`onnxruntime-cpu, batch 1, sequence 32, threads 1`; parts that are not there are left out.

    Images have no sequence; that of a model that generates is not what is measured.
    """
    parts = [str(target["name"])] if target.get("name") else []
    workload = target.get("workload")
    if isinstance(workload, Mapping):
        unused = "sequence" if workload.get("image") or workload.get("generate") else None
        parts += [f"{k} {v}" for k, v in workload.items() if v is not None and k != unused]
    return ", ".join(parts)


def _measured(
    view: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], dense: Mapping[str, Any] | None
) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    memory = any(trial["peak_memory_bytes"] is not None for trial in trials)
    budget = view_budget(view)
    several = len({trial.get("runtime") for trial in trials}) > 1
    table.add_column("", no_wrap=True)
    table.add_column("id", no_wrap=True)
    table.add_column("by", no_wrap=True)
    metrics = [trial.get("metric") or {} for trial in trials]
    measure = quality_name(metrics, [trial["quality"] for trial in trials])
    if several:
        table.add_column("runtime", no_wrap=True)
    for name in (measure, "latency", "", "size", "", *(("memory",) if memory else ())):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("budget", no_wrap=True)
    for trial, metric in zip(trials, metrics, strict=True):
        chosen = trial["id"] == view.get("chosen")
        mark = ("▸" if chosen else "") + ("●" if trial["on_front"] else "")
        cells = [mark, str(trial["id"]), str(trial["proposed_by"])]
        if several:
            cells.append(str(trial.get("runtime") or ""))
        cells.append(format_metric(trial["quality"], metric, measure))
        for name in COSTS[:2]:
            cells.append(format_cost(name, trial[name]))
            cells.append(format_share(trial[name], None if dense is None else dense[name]))
        if memory:
            cells.append(format_cost("peak_memory_bytes", trial["peak_memory_bytes"]))
        style = "bold green" if chosen else "" if trial["on_front"] else "dim"
        table.add_row(*cells, verdict(trial, budget), style=style)
    return table


def _estimated(trials: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        box=None,
        padding=(0, 1, 0, 0),
        header_style="dim",
        pad_edge=False,
        title="Predicted by the cost table; error against measured",
        title_justify="left",
        title_style="",
    )
    table.add_column("id", no_wrap=True)
    for name in ("latency", "error", "size", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for trial in trials:
        figures = trial.get("estimated") or {}
        if not any(figures.values()):
            continue
        row = [str(trial["id"])]
        for name in COSTS[:2]:
            value, truth = figures.get(name), trial[name]
            gap = "" if not value or not truth else f"{100 * (value / truth - 1):+.1f}%"
            row += [format_cost(name, value), gap]
        table.add_row(*row)
    return table


def next_steps(view: Mapping[str, Any]) -> list[Text]:
    """What to do next, as a command to paste."""
    study = str(view["study"])
    if view.get("chosen") is not None:
        what = "best"
        if (selection := view.get("selection")) and selection["best"] != view["chosen"]:
            closest = selection["closest"] == view["chosen"]
            what = f"{'closest to the teacher' if closest else 'simplest'} within noise of the best"
        return [
            Text(f"{view['chosen']} is the {what} that meets the budget. Export it:", style="dim"),
            Text(f"  autocomp pick {study} --export out/", style="bold"),
        ]
    lines = [Text("No measured model meets the budget.", style="red")]
    found = view.get("nearest")
    if found is None:
        return lines
    nearest = next(trial for trial in view["trials"] if trial["id"] == found["id"])
    relaxed = "".join(_relaxed(view["budget"], nearest))
    return [
        *lines,
        Text(f"Nearest: {nearest['id']}. Search on with more --trials, or accept it:", style="dim"),
        Text(f"  autocomp pick {study}{relaxed} --export out/", style="bold"),
    ]


def _relaxed(budget: Mapping[str, Any], trial: Mapping[str, Any]) -> Iterator[str]:
    """Flags for the limits of a budget, moved to where a trial meets them."""
    for dimension, name in FIELDS.items():
        if budget.get(name) is not None and trial[name] is not None:
            limit = format_limit(max(budget[name], trial[name]), dimension)
            yield f' --{dimension.replace("_", "-")} "{limit}"'
    if budget.get("quality") is not None:
        scale = Scale.of([(trial.get("metric") or {}, trial["quality"])])
        yield f' --quality "{scale.written(min(budget["quality"], trial["quality"]))}"'
