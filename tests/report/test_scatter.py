"""The text scatter: every point in its cell."""

from __future__ import annotations

import math

from autocomp.core.metric import Scale
from autocomp.report.axes import cost_range, quality_range
from autocomp.report.scatter import Point, draw_scatter


def plot(points: list[Point], **options: object) -> list[str]:
    settings: dict[str, object] = {"width": 70, "height": 10, "limit": None, "label": "ms"}
    return [line.plain for line in draw_scatter(points, **{**settings, **options})]  # type: ignore[arg-type]


def test_corners() -> None:
    lines = plot([Point(1.0, 0.9, "A", ""), Point(10.0, 0.1, "B", "")])
    assert "A" in lines[0]
    assert "B" in lines[9]
    assert lines[0].index("A") < lines[9].index("B")


def test_a_point_falls_where_its_logarithm_says() -> None:
    points = [Point(1.0, 0.1, "a", ""), Point(3.0, 0.5, "b", ""), Point(10.0, 0.9, "c", "")]
    lines = plot(points)
    x_axis = cost_range([1.0, 3.0, 10.0])
    y_axis = quality_range([0.1, 0.5, 0.9])
    columns = 70 - 9
    for point in points:
        share = math.log(point.cost / x_axis.low) / math.log(x_axis.high / x_axis.low)
        height = (point.quality - y_axis.low) / (y_axis.high - y_axis.low)
        line = lines[9 - int(height * 10)]
        assert line[9 + int(share * columns)] == point.symbol


def test_the_budget_is_a_line_between_what_meets_it_and_what_does_not() -> None:
    lines = plot([Point(1.0, 0.5, "x", ""), Point(9.0, 0.5, "y", "")], limit=3.0)
    (row,) = [line for line in lines if "x" in line]
    assert row.index("x") < row.index("┊") < row.index("y")
    assert sum("┊" in line for line in lines) == 10


def test_a_perplexity_is_better_above_and_its_ticks_say_so() -> None:
    points = [Point(1.0, 1 / 80, "p", ""), Point(2.0, 1 / 60, "o", ""), Point(9.0, 1 / 50, "g", "")]
    lines = plot(points, scale=Scale("perplexity", True), height=12)
    rows = {symbol: next(i for i, line in enumerate(lines) if symbol in line) for symbol in "pog"}
    assert rows["g"] < rows["o"] < rows["p"]
    ticks = [(i, float(line.split("┤")[0])) for i, line in enumerate(lines) if "┤" in line]
    assert len(ticks) == 4
    assert [tick for _, tick in ticks] == sorted(tick for _, tick in ticks)
    assert all(45 < tick < 90 for _, tick in ticks)
    row = min(ticks, key=lambda tick: abs(tick[1] - 60))  # linear in the logarithm
    assert abs(row[0] - rows["o"]) <= 3


def test_in_one_cell_the_higher_order_shows() -> None:
    points = [Point(2.0, 0.5, "H", "", order=2), Point(2.0, 0.5, "L", "", order=1)]
    text = "".join(plot([*points, Point(4.0, 0.6, "o", "")]))
    assert "H" in text
    assert "L" not in text


def test_no_line_is_wider_than_asked() -> None:
    points = [Point(0.8 + i, 0.1 * i, "o", "") for i in range(9)]
    for width in (40, 71, 110):
        assert max(map(len, plot(points, width=width, limit=2.0))) <= width


def test_a_value_below_the_axis_is_drawn_on_its_edge() -> None:
    points = [Point(1.0 + i, 0.9 + 0.001 * i, "o", "") for i in range(6)]
    lines = plot([*points, Point(3.0, 0.1, "R", "")])
    assert "R" in lines[9]


def test_plain_characters_only() -> None:
    lines = plot([Point(1.0, 0.5, "x", ""), Point(2.0, 0.6, "x", "")], limit=1.5, ascii_only=True)
    assert "\n".join(lines).isascii()
