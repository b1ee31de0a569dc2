"""What `autocomp profile` measured, for a terminal: each option's latency and size at each unit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from autocomp.report.figures import format_cost, format_share, latency_note
from autocomp.report.tables import describe_device, plain_table

_LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_DENSE = "dense"


def print_profile(console: Console, data: Mapping[str, Any]) -> None:
    """The cost table of `autocomp profile --json`, one for each runtime there is."""
    for index, report in enumerate((data.get("runtimes") or {"": data}).values()):
        if index:
            console.print()
        _print_report(console, report)


def _print_report(console: Console, report: Mapping[str, Any]) -> None:
    console.print(Text(describe_device(report["target"]), "bold"), soft_wrap=True)
    estimated = report["estimated"]
    facts = plain_table("", "latency", "size", right=("latency", "size"))
    for title in ("dense", "smallest"):
        costs = estimated[title]
        if costs is not None:
            latency, size = costs["latency_ms"], costs["size_bytes"]
            facts.add_row(
                f"{title}, estimated",
                format_cost("latency_ms", latency),
                format_cost("size_bytes", size),
            )
    console.print(facts)
    console.print()
    figures = ("latency", "of dense", "size", "of dense")
    table = plain_table("unit", "option", *figures, right=figures)
    for unit, options in grouped(report["units"]).items():
        dense = options.get(_DENSE, {})
        for number, (option, costs) in enumerate(options.items()):
            cells = [unit if number == 0 else "", option]
            for name in ("latency_ms", "size_bytes"):
                cells += [format_cost(name, costs[name])]
                cells += [format_share(costs[name], dense.get(name))]
            table.add_row(*cells)
    console.print(table)
    console.print()
    error = estimated["error"]
    told = "not known: too few whole candidates" if error is None else f"{error:.1%} on average"
    for line in (
        "Each unit's latency is its own, timed alone; a model's is their sum, corrected.",
        f"Error of that for whole candidates left out of the correction: {told}.",
        f"Latency is {latency_note(report['target'])}." if latency_note(report["target"]) else "",
    ):
        if line:
            console.print(Text(line, "dim"), soft_wrap=True)


def grouped(
    units: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> dict[str, Mapping[str, Mapping[str, float]]]:
    """Units that differ in their layer alone and cost the same, under one name.

    `layers.0.attention` to `layers.5.attention` become `layers.0–5.attention`.
    """
    alike: list[tuple[str, Mapping[str, Any], list[str]]] = []
    for name, options in units.items():
        pattern = _LAYER.sub("*", name, count=1)
        for known, costs, names in alike:
            if (known, list(costs.items())) == (pattern, list(options.items())):
                names.append(name)
                break
        else:
            alike.append((pattern, options, [name]))
    return {_joined(pattern, names): costs for pattern, costs, names in alike}


def _joined(pattern: str, names: Sequence[str]) -> str:
    """`layers.*.ffn` with the numbers of these names: `layers.0–2,5.ffn`."""
    if len(names) == 1:
        return names[0]
    runs: list[list[int]] = []
    for number in sorted(int(match[0]) for match in map(_LAYER.search, names) if match):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
    return pattern.replace("*", text)
