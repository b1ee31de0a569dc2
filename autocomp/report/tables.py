"""Tables for the terminal beside the front: a picked trial, a check, extensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autocomp.core.metric import Scale
from autocomp.core.quantities import format_bytes
from autocomp.report.figures import (
    COST_NAMES,
    COSTS,
    format_cost,
    format_metric,
    format_share,
    quality_name,
    shown_figure,
    summarise_option,
)
from autocomp.report.finalists import interval_text, selection_line
from autocomp.report.terminal import describe_target, report_line


def plain_table(*columns: str, right: Sequence[str] = ()) -> Table:
    """A table without lines; `right` names the columns of figures."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name in right)
    return table


def print_picked(
    console: Console,
    trial: Mapping[str, Any],
    dense: Mapping[str, Any] | None,
    exported: Mapping[str, Any] | None,
    next_command: str,
) -> None:
    """One trial: its measured figures against dense, what is done to each unit, where it went."""
    runtime = trial["candidate"].get("runtime")
    console.print(
        Text.assemble(
            (str(trial["id"]), "bold green"),
            (f"  by {trial['proposed_by']}", "dim"),
            (f", on {runtime}" if runtime else "", "dim"),
        )
    )
    table = plain_table("", "measured", "of dense", "predicted", right=("measured", "of dense"))
    predicted = trial.get("estimated") or {}
    pair = [trial] if dense is None else [trial, dense]
    metrics = [each.get("metric") or {} for each in pair]
    measure = quality_name(metrics, [each["quality"] for each in pair])
    figures = [shown_figure(each, measure) for each in pair]
    scale = Scale.of((each.get("metric") or {}, each["quality"]) for each in pair)
    interval = interval_text(scale, trial.get("quality_low"), trial.get("quality_high"))
    table.add_row(
        measure, format_metric(trial["quality"], metrics[0], measure), _gap(figures, measure), ""
    )
    for name in COSTS:
        value = trial.get(name)
        if value is None:
            continue
        share = format_share(value, None if dense is None else dense.get(name))
        guess = predicted.get(name)
        table.add_row(
            COST_NAMES[name],
            format_cost(name, value),
            share,
            "" if guess is None else format_cost(name, guess),
        )
    console.print(table)
    reasons = [f"{measure}: 95% interval {interval}"] if interval else []
    if trial.get("selection") is not None:
        reasons.append(selection_line(trial["selection"], scale))
    if trial.get("report") is not None:
        reasons.append(report_line(trial["report"]))
    if reasons:
        console.print()
    for reason in reasons:
        console.print(reason, markup=False, highlight=False, soft_wrap=True)
    units = plain_table("unit", "option")
    for unit, option in trial["candidate"]["units"].items():
        units.add_row(unit, summarise_option(option))
    console.print()
    console.print(units)
    console.print()
    if exported is None:
        console.print("Export it:", style="dim")
        console.print(f"  {next_command}", style="bold", soft_wrap=True, markup=False)
    else:
        place = exported.get("directory") or exported.get("path") or ""
        console.print(f"Exported and verified: {place}", markup=False, soft_wrap=True)


def describe_device(described: Mapping[str, Any]) -> str:
    """`onnxruntime-cpu (onnxruntime 1.20), AMD …, batch 1, sequence 32, threads 1`."""
    words = [str(described.get("target") or "")]
    if described.get("runtime"):
        words[0] += f" ({described['runtime']})"
    workload = describe_target({"workload": described.get("workload")})
    return ", ".join(word for word in (*words, described.get("cpu"), workload) if word)


def _gap(figures: Sequence[float | None], measure: str) -> str:
    """A trial's figure less dense's, with its sign; empty where there is none of dense."""
    known = [figure for figure in figures if figure is not None]
    if len(known) < 2:
        return ""
    return f"{known[0] - known[1]:{'+.3f' if measure == 'quality' else '+.3g'}}"


def print_check(console: Console, report: Mapping[str, Any], spec: str) -> None:
    """What `autocomp check` found. Keys that the report does not have are left out."""
    heading = plain_table("", "")
    heading.show_header = False
    for name in ("model", "task"):
        if report.get(name):
            heading.add_row(name, str(report[name]))
    if report.get("target"):
        heading.add_row("target", describe_device(report["target"]))
    if heading.row_count:
        console.print(heading)
        console.print()
    rules = report.get("rules") or []
    if rules:
        table = plain_table("rule", "matches", "units", right=("units",))
        for index, rule in enumerate(rules):
            units = rule.get("units", 0)
            count = len(units) if isinstance(units, list) else units
            table.add_row(f"space[{index}]", str(rule.get("match", "")), str(count))
        console.print(table)
        console.print()
    units = report.get("units") or []
    if units:
        table = plain_table(
            "unit", "kind", "parameters", "options", right=("parameters", "options")
        )
        for unit in units:
            parameters = unit.get("parameters")
            table.add_row(
                str(unit.get("name", "")),
                str(unit.get("kind", "")),
                "" if parameters is None else f"{parameters:,}",
                str(unit.get("options", "")),
            )
        console.print(table)
        console.print()
    runtimes = report.get("runtimes") or []
    if len(runtimes) > 1:
        table = plain_table("runtime", "options", "smallest size", right=("options",))
        for each in runtimes:
            smallest = format_bytes(each["smallest_size_bytes"])
            table.add_row(str(each["runtime"]), str(each["options"]), smallest)
        console.print(table)
        console.print()
    facts = plain_table("", "")
    facts.show_header = False
    if report.get("space_log10") is not None:
        facts.add_row("space", f"10^{report['space_log10']:.1f} candidates")
    dense = report.get("dense_size_bytes")
    for title, size in (
        ("dense size", dense),
        ("smallest size", report.get("smallest_size_bytes")),
    ):
        if size is not None:
            share = f"{format_share(size, dense)} of dense" if dense and size != dense else ""
            facts.add_row(title, " ".join([format_bytes(size), share and f"({share})"]).strip())
    limit = report.get("size_limit_bytes")
    for name, value in (report.get("budget") or {}).items():
        if value is not None:
            relative = name == "size" and limit is not None and str(value).endswith("%")
            absolute = f" of dense, {format_bytes(limit)}" if relative else ""
            facts.add_row(f"budget {name.replace('_', ' ')}", f"{value}{absolute}")
    console.print(facts)
    for note in report.get("notes") or []:
        console.print(Text(f"· {note}", style="dim"), soft_wrap=True)
    problems = report.get("problems") or []
    for problem in problems:
        console.print(Text(f"✗ {problem}", style="red"))
    if not problems:
        console.print("\nNo problems. Next:", style="dim")
        console.print(f"  autocomp search {spec}", style="bold", soft_wrap=True, markup=False)


def print_kind(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Extensions of one kind: name, summary, where it pays, paper."""
    for row in rows:
        console.print(
            Text.assemble((str(row["name"]), "bold cyan"), f"  {row.get('summary') or ''}")
        )
        for name, value in (
            ("options", row.get("options")),
            ("expresses", row.get("expresses")),
            ("speeds up", ", ".join(row.get("speeds_up") or [])),
            ("shrinks", ", ".join(row.get("shrinks") or [])),
            ("saves memory", ", ".join(row.get("saves_memory") or [])),
            ("paper", row.get("paper")),
        ):
            if value:
                console.print(Text(f"    {name}: {value}", style="dim"), soft_wrap=True)
