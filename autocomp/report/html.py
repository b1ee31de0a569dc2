"""The front as one web page: inline SVG, a little plain JavaScript, nothing from the network.

Works from a file, by mail and in MLflow's sandboxed artifact frame. The page's text, style and
script are in `front_page.html` beside this file; here the data is prepared: figures are formatted
once, in Python, and the script only places them, as text nodes.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from autocomp.core.budget import Budget
from autocomp.core.metric import Scale
from autocomp.report.axes import cost_range, log_ticks, quality_axis
from autocomp.report.figures import (
    COST_NAMES,
    COSTS,
    format_cost,
    format_excess,
    format_metric,
    format_share,
    latency_note,
    missed,
    quality_name,
    shown_figure,
    summarise_option,
    verdict,
    view_budget,
    view_scale,
)
from autocomp.report.finalists import interval_text, selection_line
from autocomp.report.summary import candidate_figures, figures_text
from autocomp.report.terminal import describe_target, report_line


def front_html(view: Mapping[str, Any]) -> str:
    """A self-contained page for the `front --json` mapping."""
    page = files("autocomp.report").joinpath("front_page.html").read_text(encoding="utf-8")
    title = html.escape(f"{view['study']}: front")
    data = json.dumps(_page_data(view), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return page.replace("__TITLE__", title, 1).replace('"__DATA__"', data, 1)


def _page_data(view: Mapping[str, Any]) -> dict[str, Any]:
    dense = next((t for t in view["trials"] if t["id"] == view.get("dense")), None)
    measure = quality_name(
        [trial.get("metric") or {} for trial in view["trials"]],
        [trial["quality"] for trial in view["trials"]],
    )
    scale, budget = view_scale(view), view_budget(view)
    trials = [_trial(trial, dense, view, measure, scale, budget) for trial in view["trials"]]
    drawn = [trial for trial in view["trials"] if _drawable(trial)]
    hypervolume, report = view.get("hypervolume"), view.get("report")
    selection = view.get("selection")
    return {
        "study": str(view["study"]),
        "target": describe_target(view.get("target") or {}),
        "latency": latency_note(view.get("target") or {}),
        "budget": budget.describe(scale),
        "hypervolume": None if hypervolume is None else f"{hypervolume:.4g}",
        "report": None if report is None else report_line(report),
        "selection": None if selection is None else selection_line(selection, scale),
        "dense": view.get("dense"),
        "runtimes": len({trial.get("runtime") for trial in view["trials"]}),
        "failed": sum(trial["state"] == "failed" for trial in view["trials"]),
        "trials": trials,
        "measure": measure,
        "quality": _quality_axis(drawn, scale, budget.quality),
        "costs": [_cost_axis(name, drawn, view["budget"].get(name)) for name in COSTS[:2]],
    }


def _drawable(trial: Mapping[str, Any]) -> bool:
    return bool(
        trial["measured"]
        and trial["quality"] is not None
        and trial["latency_ms"]
        and trial["size_bytes"]
    )


def _quality_axis(
    drawn: list[Mapping[str, Any]], scale: Scale, floor: float | None
) -> dict[str, Any]:
    """Heights of the axis, of its ticks and of the floor; better is above on every scale."""
    title = f"{scale.name}, lower is better" if scale.reciprocal else scale.name
    if not drawn:
        return {"title": title, "low": 0.0, "high": 1.0, "ticks": [], "floor": None}
    values = [trial["quality"] for trial in drawn]
    if floor is not None and floor > min(values):
        values.append(floor)
    axis = quality_axis(values, scale)
    height = None if floor is None else scale.height(floor)
    return {
        "title": title,
        "low": axis.low,
        "high": axis.high,
        "clipped": axis.clipped,
        "ticks": axis.ticks,
        "floor": height if height is not None and axis.low < height < axis.high else None,
        "floorText": None if floor is None else f"budget {scale.floor(floor)}",
    }


def _cost_axis(name: str, drawn: list[Mapping[str, Any]], limit: float | None) -> dict[str, Any]:
    values = [trial[name] for trial in drawn] + ([limit] if limit else []) or [1.0, 10.0]
    axis = cost_range(values)
    unit, scale = ("ms", 1.0) if name == "latency_ms" else ("MB", 1e6)
    return {
        "name": name,
        "title": f"{COST_NAMES[name]}, {unit}",
        "low": axis.low,
        "high": axis.high,
        "limit": limit,
        "limitText": None if limit is None else f"budget {format_cost(name, limit)}",
        "ticks": [
            [tick * scale, f"{tick:.4g}"] for tick in log_ticks(axis.low / scale, axis.high / scale)
        ],
    }


def _trial(
    trial: Mapping[str, Any],
    dense: Mapping[str, Any] | None,
    view: Mapping[str, Any],
    measure: str,
    scale: Scale,
    budget: Budget,
) -> dict[str, Any]:
    """What the script needs of one trial; every figure also as text.

    `height` is where the plot draws its quality, `shown` the figure that the table sorts by.
    """
    predicted = trial.get("estimated") or {}
    text = {"quality": format_metric(trial["quality"], trial.get("metric") or {}, measure)}
    text["interval"] = interval_text(scale, trial.get("quality_low"), trial.get("quality_high"))
    kl = trial.get("teacher_kl")
    text["teacher_kl"] = "–" if kl is None else f"{kl:.3g}"
    for name in COSTS:
        share = format_share(trial[name], None if dense is None else dense[name])
        text[name] = format_cost(name, trial[name])
        text[f"{name}_share"] = share
        text[f"{name}_predicted"] = format_cost(name, predicted.get(name))
    drawn, quality = _drawable(trial), trial["quality"]
    over = missed(trial, budget) if drawn and trial["kind"] != "dense" else {}
    return {
        "id": str(trial["id"]),
        "kind": trial["kind"],
        "by": str(trial["proposed_by"]),
        "runtime": trial.get("runtime") or "",
        "state": trial["state"],
        "drawn": drawn,
        "front": trial["on_front"],
        "feasible": trial["feasible"],
        "verdict": verdict(trial, budget),
        "missed": format_excess(over, scale),
        "chosen": trial["id"] == view.get("chosen"),
        "quality": quality,
        "height": scale.height(quality) if drawn else None,
        "shown": shown_figure(trial, measure),
        "teacher_kl": kl,
        **{name: trial[name] for name in COSTS},
        "text": text,
        "summary": figures_text(candidate_figures(trial["candidate"])),
        "units": [
            [unit, summarise_option(option)] for unit, option in trial["candidate"]["units"].items()
        ],
    }
