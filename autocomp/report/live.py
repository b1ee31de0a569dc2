"""The live view of a search in a terminal, and its plain form where there is no terminal.

`open_view` picks one: a view redrawn at most four times a second on a terminal, log lines
otherwise, nothing with `quiet`. Views are context managers and `SearchProgress` receivers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from autocomp.core.budget import Budget
from autocomp.core.quantities import format_seconds
from autocomp.front.pick import scale_of
from autocomp.report.figures import (
    COSTS,
    format_cost,
    format_excess,
    format_metric,
    format_share,
    quality_name,
)
from autocomp.report.progress import PHASES, SearchProgress, Silent
from autocomp.report.scatter import Point, draw_scatter
from autocomp.report.state import PhaseState, SearchState
from autocomp.study.records import TrialRecord

_REFRESH_PER_SECOND = 4
_MAX_WIDTH = 110
_ROOMY_HEIGHT = 30
_SCATTER_FRAME = 3
"""Lines of the scatter beside the plot: legend, axis, ticks."""


def open_view(
    console: Console, *, quiet: bool = False, study: str | None = None
) -> AbstractContextManager[SearchProgress]:
    """The view that suits this console. `study` is what the header shows until more is known."""
    if quiet:
        return _Quiet()
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveView(console, study=study)
    from autocomp.report.lines import LineView

    return LineView(console, study=study)


class _Quiet(Silent):
    """Nothing, as a context manager."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class LiveView(SearchState):
    """The live view: header, phases, funnel, scatter, three rows, failures, notes.

    ```
    with LiveView(console, study="runs/quickstart") as view:
        view.phase("teacher", total=40)
        view.advance(1)
    ```
    Fits 80 × 24: the scatter takes the rows the rest leaves.
    """

    def __init__(
        self,
        console: Console,
        *,
        study: str | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """`clock` gives seconds, monotonic; tests pass their own."""
        if clock is None:
            super().__init__()
        else:
            super().__init__(clock)
        self.console = console
        self.study = study
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._live = Live(
            self,
            console=self.console,
            refresh_per_second=_REFRESH_PER_SECOND,
            vertical_overflow="crop",
        )
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.end_phase()
        if self._live is not None:
            self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Nothing is yielded under the lock: Rich draws while holding locks of its own.
        with self.lock:
            width = min(options.max_width, _MAX_WIDTH)
            ascii_only = options.ascii_only
            roomy = console.height >= _ROOMY_HEIGHT
            gap = [Text()] if roomy else []
            before = [
                *self._header(width, ascii_only, roomy),
                *self._phases(width, ascii_only, roomy),
                *self._funnel(width, ascii_only),
            ]
            rows = self._rows()
            after = [*self._running(width), *self._failures(width), *self._notes(width, roomy)]
            used = len(before) + len(after) + (0 if rows is None else 4 + len(gap))
            height = min(18, console.height - 1 - used - len(gap) - _SCATTER_FRAME)
            parts: list[Text | Table] = [*before]
            scatter = self._scatter(width, height, ascii_only)
            if scatter:
                parts += [*gap, *scatter]
            if rows is not None:
                parts += [*gap, rows]
            parts += after
        yield Group(*parts)

    def _header(self, width: int, ascii_only: bool, roomy: bool) -> list[Text]:
        title = Text.assemble(("autocomp", "bold"))
        if self.study:
            title.append(f"  {self.study}", style="cyan")
        times = f"elapsed {format_seconds(self.elapsed_s())}"
        current = self.current
        if current is not None and current.name in PHASES[-2:]:
            eta_s = current.eta_s(self.clock())
            if eta_s is not None:
                times += f" · done in about {format_seconds(eta_s)}"
        title.truncate(max(10, width - len(times) - 2), overflow="ellipsis")
        title.append(times.rjust(width - title.cell_len), style="dim")
        lines = [title]
        what = " → ".join(part for part in (self.model, self.target) if part)
        if what:
            lines.append(_fit(Text(what, style="dim"), width))
        if self.budget is not None:
            lines.append(
                _fit(
                    Text.assemble(
                        ("budget  ", "dim"),
                        (self.budget.describe(scale_of(self.measured())), "yellow"),
                    ),
                    width,
                )
            )
        if roomy:
            lines.append(Text(("-" if ascii_only else "─") * width, style="dim"))
        return lines

    def _phases(self, width: int, ascii_only: bool, roomy: bool) -> list[Text]:
        now_s = self.clock()
        check = "+" if ascii_only else "✓"
        line = Text()
        for phase in self.phases:
            if phase.ended_s is not None:
                line.append(f"{check} ", style="green")
                line.append(phase.name)
                seconds = f" {format_seconds(phase.seconds(now_s))}" if roomy else ""
                line.append(f"{seconds}  ", style="dim")
        lines = [_fit(line, width)] if line else []
        if self.current is not None:
            lines.append(_bar(self.current, now_s, width, ascii_only))
        return lines

    def _funnel(self, width: int, ascii_only: bool) -> list[Text]:
        counts = self.funnel_counts()
        if not counts:
            return []
        line = Text()
        for index, (name, count) in enumerate(counts):
            if index:
                line.append(" > " if ascii_only else " › ", style="dim")
            line.append(f"{count:,}", style="bold")
            line.append(f" {name}", style="dim")
        return [_fit(line, width)]

    def _scatter(self, width: int, height: int, ascii_only: bool) -> list[Text]:
        records = self.measured()
        by_size = self.budget is not None and (
            self.budget.latency_ms is None and self.budget.size_bytes is not None
        )
        unit = 1e6 if by_size else 1.0
        best = self.best("search")
        marks = _ASCII_MARKS if ascii_only else _MARKS
        points = []
        for record in records:
            assert record.measured is not None
            assert record.quality is not None
            value = record.measured.size_bytes if by_size else record.measured.latency_ms
            if not value:
                continue
            name: str = record.kind if record.kind != "search" else "over"
            if record.kind == "search" and not self.excess(record):
                name = "best" if record is best else "found"
            symbol, style, order = marks[name]
            points.append(Point(value / unit, record.quality, symbol, style, order))
        if height < 5 or len(points) < 2:
            return []
        limit = None
        if self.budget is not None:
            limit = self.budget.size_bytes if by_size else self.budget.latency_ms
        scale = scale_of(records)
        plot = draw_scatter(
            points,
            scale=scale,
            width=width,
            height=height,
            limit=None if limit is None else limit / unit,
            label="size, MB" if by_size else "latency, ms",
            ascii_only=ascii_only,
        )
        legend = Text.assemble((f"{scale.name}  ", "dim"))
        for mark, word in _LEGEND:
            symbol, style, _ = marks[mark]
            legend.append(f"{symbol} ", style=style)
            legend.append(f"{word}  ", style="dim")
        return [_fit(legend, width), *plot]

    def _rows(self) -> Table | None:
        dense = self.dense()
        if dense is None:
            return None
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
        table.add_column("", no_wrap=True)
        measure = quality_name([dense.metric], [dense.quality])
        for name in (measure, "latency", "", "size", ""):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("budget", no_wrap=True, overflow="ellipsis")
        named = (
            ("dense", dense),
            ("best uniform", self.best("uniform")),
            ("best found", self.best("search")),
        )
        for name, record in named:
            style = "bold" if name == "best found" else ""
            if record is not None and record.candidate.runtime is not None:
                name = f"{name}, {record.candidate.runtime}"
            if record is None or record.measured is None:
                table.add_row(Text(name, style="dim"), "–", "–", "", "–", "", "")
                continue
            quality = format_metric(record.quality, record.metric, measure)
            cells = [Text(name, style=style), Text(quality, style=style)]
            for cost in COSTS[:2]:
                value = getattr(record.measured, cost)
                share = format_share(value, getattr(dense.measured, cost))
                cells += [Text(format_cost(cost, value), style=style), Text(share, style="dim")]
            table.add_row(*cells, self._verdict(record))
        return table

    def _verdict(self, record: TrialRecord) -> Text:
        if self.budget is None or record.kind == "dense":
            return Text()
        over = self.excess(record)
        told = format_excess(over, scale_of([record]))
        return Text(told, style="red") if over else Text("met", style="green")

    def _running(self, width: int) -> list[Text]:
        texts = self.running_trials()
        return [_fit(Text("running  " + "  ".join(texts), style="dim"), width)] if texts else []

    def _failures(self, width: int) -> list[Text]:
        failures = self.failures()
        if not failures:
            return []
        total = sum(count for _, count in failures)
        lines = [f"{count} × {cause}" for cause, count in failures[:3]]
        word = "trial" if total == 1 else "trials"
        return [_fit(Text(f"{total} {word} failed: " + "; ".join(lines), style="red"), width)]

    def _notes(self, width: int, roomy: bool) -> list[Text]:
        shown = list(self.notes) if roomy else list(self.notes)[-1:]
        return [_fit(Text(note), width) for note in shown]


_MARKS = {
    "over": ("○", "blue", 0),
    "uniform": ("▲", "magenta", 1),
    "dense": ("■", "white", 2),
    "found": ("●", "green", 3),
    "best": ("★", "bold green", 4),
}
_ASCII_MARKS = {
    "over": ("o", "blue", 0),
    "uniform": ("u", "magenta", 1),
    "dense": ("D", "white", 2),
    "found": ("x", "green", 3),
    "best": ("*", "bold green", 4),
}
_LEGEND = (
    ("dense", "dense"),
    ("uniform", "uniform"),
    ("over", "over budget"),
    ("found", "within budget"),
    ("best", "best"),
)


def _fit(text: Text, width: int) -> Text:
    text.no_wrap = True
    text.truncate(width, overflow="ellipsis")
    return text


def _bar(phase: PhaseState, now_s: float, width: int, ascii_only: bool) -> Text:
    """`▸ library ━━━━━━────── 214/600  36%  ETA 1m10s`."""
    line = Text.assemble((f"{'>' if ascii_only else '▸'} {phase.name} ", "bold cyan"))
    if phase.total:
        share = min(1.0, phase.done / phase.total)
        eta_s = phase.eta_s(now_s)
        tail = f" {phase.done}/{phase.total}  {100 * share:.0f}%  ETA {format_seconds(eta_s)}"
        room = max(8, min(40, width - line.cell_len - len(tail)))
        full = round(share * room)
        on, off = ("#", ".") if ascii_only else ("━", "─")
        line.append(on * full, style="cyan")
        line.append(off * (room - full), style="dim")
        line.append(tail)
    else:
        line.append(f" {format_seconds(phase.seconds(now_s))}", style="dim")
    return _fit(line, width)


def describe_trial(record: TrialRecord, dense: TrialRecord | None, budget: Budget | None) -> str:
    """One line on a finished trial, for logs."""
    runtime = record.candidate.runtime
    head = f"trial {record.id} ({record.proposed_by}{f', on {runtime}' if runtime else ''})"
    if record.state != "complete" or record.measured is None:
        cause = (record.error or record.state).strip().splitlines()[0]
        return f"{head}: {record.state}: {cause}" if record.error else f"{head}: {cause}"
    measure = quality_name([record.metric], [record.quality])
    parts = [f"{measure} {format_metric(record.quality, record.metric, measure)}"]
    for cost in COSTS[:2]:
        value = getattr(record.measured, cost)
        base = None if dense is None or dense.measured is None else getattr(dense.measured, cost)
        share = format_share(value, base)
        word = "latency" if cost == "latency_ms" else "size"
        parts.append(f"{word} {format_cost(cost, value)}" + (f" ({share})" if share else ""))
    if budget is not None:
        over = {k: v for k, v in budget.excess(record.measured, record.quality).items() if v > 0}
        told = format_excess(over, scale_of([record]))
        parts.append(f"over budget: {told}" if over else "meets the budget")
    if record.undone:
        parts.append("training undone: it led away from the teacher")
    parts.append(format_seconds(sum(record.seconds.values())))
    return f"{head}: " + ", ".join(parts)
