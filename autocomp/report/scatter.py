"""A scatter of quality against cost in characters, with the budget as a vertical line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.text import Text

from autocomp.core.metric import Scale
from autocomp.report.axes import Range, cost_range, log_ticks, quality_range

_GUTTER = 8


@dataclass(frozen=True)
class Point:
    """`cost` > 0 in the axis's unit. Of points in one cell, the highest `order` shows."""

    cost: float
    quality: float
    symbol: str
    style: str
    order: int = 0


def draw_scatter(
    points: Sequence[Point],
    *,
    width: int,
    height: int,
    limit: float | None,
    label: str,
    scale: Scale | None = None,
    ascii_only: bool = False,
) -> list[Text]:
    """Lines of text: `height` rows of plot, then the axis and its ticks.

    Args:
        points: at least one.
        width, height: characters of the whole, rows of the plot.
        limit: the budget on the cost axis, drawn as a vertical line.
        label: name and unit of the cost axis.
        scale: what the ticks of the quality axis are given in; better is above on every scale.
        ascii_only: draw lines with plain characters.
    """
    columns = max(10, width - _GUTTER - 1)
    costs = [point.cost for point in points] + ([limit] if limit else [])
    scale = scale or Scale()
    heights = [scale.height(point.quality) for point in points]
    x_range, y_range = cost_range(costs), quality_range(heights)
    cells: list[list[tuple[str, str]]] = [[(" ", "")] * columns for _ in range(height)]
    corner, wall, floor, bar = ("+", "|", "-", ":") if ascii_only else ("└", "┤", "─", "┊")

    def column_of(cost: float) -> int:
        return _cell(math.log(cost), math.log(x_range.low), math.log(x_range.high), columns)

    if limit:
        for row in cells:
            row[column_of(limit)] = (bar, "yellow")
    for point in sorted(points, key=lambda point: point.order):
        at = scale.height(point.quality)
        row_index = height - 1 - _cell(at, y_range.low, y_range.high, height)
        cells[row_index][column_of(point.cost)] = (point.symbol, point.style)

    labels = _row_labels(y_range, height, scale)
    lines = []
    for index, row in enumerate(cells):
        text = Text.assemble((labels.get(index, "").rjust(_GUTTER - 1) + " ", "dim"))
        text.append(wall if index in labels else ("|" if ascii_only else "│"), style="dim")
        for symbol, style in row:
            text.append(symbol, style=style)
        lines.append(text)
    lines.append(Text(" " * _GUTTER + corner + floor * columns, style="dim"))
    lines.append(_axis(x_range, columns, column_of, label))
    return lines


def _cell(value: float, low: float, high: float, cells: int) -> int:
    """Index of the cell that `value` falls in; the edge cell for values outside."""
    return max(0, min(cells - 1, int((value - low) / (high - low) * cells)))


def _row_labels(y_range: Range, height: int, scale: Scale) -> dict[int, str]:
    """Row index → figure at the middle of that row; every third row or so."""
    every = 3 if height >= 9 else 2
    step = (y_range.high - y_range.low) / height
    digits = max(2, min(5, 1 - math.floor(math.log10(step)))) if step < 10 else 0
    labels = {}
    for row in range(0, height, every):
        value = y_range.high - (row + 0.5) * step
        labels[row] = f"{math.exp(-value):.4g}" if scale.reciprocal else f"{value:.{digits}f}"
    return labels


def _axis(x_range: Range, columns: int, column_of: Callable[[float], int], label: str) -> Text:
    """The ticks under the plot, the axis label at the right."""
    line = [" "] * columns
    name = f" {label}"
    room = columns - len(name)
    end = -2
    for tick in log_ticks(x_range.low, x_range.high, most=max(2, columns // 9)):
        text = f"{tick:.3g}"
        start = column_of(tick) - len(text) // 2
        if start > end + 1 and start >= 0 and start + len(text) <= room:
            line[start : start + len(text)] = text
            end = start + len(text)
    line[room:] = name
    return Text(" " * (_GUTTER + 1) + "".join(line), style="dim")
