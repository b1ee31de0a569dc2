"""The live view fits its terminal, says what matters, and turns into lines without one."""

from __future__ import annotations

import io
import re
import threading
from dataclasses import replace

import pytest
from rich.console import Console
from samples import BUDGET, records
from test_state import Clock

from autocomp.core.budget import Budget
from autocomp.report.lines import LineView
from autocomp.report.live import LiveView, open_view
from autocomp.report.progress import PHASES, SearchProgress
from autocomp.study.activity import Activity
from autocomp.study.records import TrialRecord


def console(width: int, height: int, encoding: str = "utf-8") -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    return Console(
        file=file, width=width, height=height, force_terminal=True, _environ={"TERM": "xterm"}
    )


def shown(view: LiveView) -> list[str]:
    """What the view draws, without colours."""
    with view.console.capture() as capture:
        view.console.print(view)
    return re.sub(r"\x1b\[[0-9;]*m", "", capture.get()).rstrip("\n").split("\n")


def play(view: SearchProgress, clock: Clock, trials: list[TrialRecord]) -> None:
    """A search, up to the middle of its trials."""
    view.header(study="runs/quickstart", model="package:model", target="onnxruntime-cpu, batch 1")
    view.header(budget=BUDGET)
    for name in PHASES[:-2]:
        view.phase(name, 100)
        clock.now_s += 61.0
        view.advance(100)
    view.phase("trials", 2 * len(trials))
    view.funnel(screened=1600, within_budget=412, stitched=20, distilled=8, measured=6, on_front=4)
    for index, trial in enumerate(trials):
        clock.now_s += 30.0
        view.trial_started(trial.id, trial.proposed_by)
        view.trial_finished(trial)
        view.advance(index + 1)
    view.trial_started("3fa9c1d2e0", "evolution")
    view.trial_advanced("3fa9c1d2e0", Activity("distil", 62, 100))
    view.note("The cost table was refitted.")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (60, 20), (200, 60)])
def test_it_fits(width: int, height: int) -> None:
    clock = Clock()
    view = LiveView(console(width, height), clock=clock)
    play(view, clock, records(20))
    lines = shown(view)
    assert len(lines) < height
    assert max(map(len, lines)) <= width


def test_a_language_model_is_shown_in_perplexity() -> None:
    clock = Clock()
    view = LiveView(console(100, 40), clock=clock)
    trials = [
        replace(trial, metric={"name": "perplexity", "value": 1 / trial.quality})
        for trial in records(12)
        if trial.quality is not None
    ]
    play(view, clock, trials)
    view.header(budget=Budget(quality=0.95))
    text = "\n".join(shown(view))
    assert "quality" not in text
    assert "budget  perplexity ≤ 1.053" in text
    assert re.search(r"best uniform +1\.104 .*perplexity \+4\.9%", text)
    assert re.search(r"^perplexity +■ dense", text, re.MULTILINE)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40)])
def test_it_says_what_matters(width: int, height: int) -> None:
    clock = Clock()
    view = LiveView(console(width, height), clock=clock)
    play(view, clock, records(12))
    lines = shown(view)
    text = "\n".join(lines)
    assert "latency ≤ 1.3 ms, size ≤ 10.1 MB" in text
    assert "1,600 screened › 412 in budget" in text
    assert "┊" in text
    assert "★" in text
    assert re.search(r"trials ━+─* 18/36  50%  ETA 9m00s", text)
    assert re.search(r"^dense +0\.902 +6\.5 ms +100% +91\.6 MB +100%", text, re.MULTILINE)
    assert re.search(r"^best uniform +0\.906 .*latency \+85%, size ×2\.3", text, re.MULTILINE)
    assert re.search(r"^best found .* met", text, re.MULTILINE)
    assert "1 trial failed: 1 × the loss became NaN at step 99" in text
    assert "3fa9c1d2e0 (evolution, 0s, distil 62%)" in text
    assert "The cost table was refitted." in text
    for name in PHASES[:-2]:
        assert f"✓ {name}" in text


def test_before_anything_is_known_it_is_short() -> None:
    view = LiveView(console(80, 24), study="runs/x", clock=Clock())
    view.phase("teacher")
    lines = shown(view)
    assert len(lines) == 2
    assert "runs/x" in lines[0]
    assert "teacher" in lines[1]


def test_square_brackets_are_text() -> None:
    clock = Clock()
    view = LiveView(console(80, 24), study="[bold]x[/bold]", clock=clock)
    view.phase("teacher")
    view.note("space[0].bits [red]")
    text = "\n".join(shown(view))
    assert "[bold]x[/bold]" in text
    assert "space[0].bits [red]" in text


def test_a_terminal_without_unicode_gets_plain_characters() -> None:
    clock = Clock()
    view = LiveView(console(80, 24, encoding="ascii"), clock=clock)
    view.header(study="runs/quickstart")
    view.phase("trials", 4)
    for trial in records(5):
        view.trial_finished(trial)
    text = "\n".join(shown(view))
    drawing = [line for line in text.split("\n") if "|" in line or "+--" in line]
    assert drawing
    assert all(line.isascii() for line in drawing)


def test_the_last_frame_stays_and_the_phase_is_over() -> None:
    screen = console(80, 24)
    clock = Clock()
    with LiveView(screen, clock=clock) as view:
        play(view, clock, records(3))
    assert view.current is None
    screen.file.flush()
    assert b"best found" in screen.file.buffer.getvalue()  # type: ignore[attr-defined]


def test_an_error_inside_passes_through() -> None:
    view = LiveView(console(80, 24))

    def search() -> None:
        with view:
            view.phase("teacher", 3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        search()
    assert view.current is not None


def test_the_lock_is_free_while_rich_draws() -> None:
    """Rich draws while it holds locks of its own: two drawing threads would wait for each other."""
    screen, clock = console(80, 24), Clock()
    view = LiveView(screen, clock=clock)
    play(view, clock, records(6))
    drawing = iter(view.__rich_console__(screen, screen.options))
    next(drawing)
    taken: list[bool] = []
    thread = threading.Thread(target=lambda: taken.append(view.lock.acquire(timeout=2)))
    thread.start()
    thread.join()
    assert taken == [True]


class TestChoice:
    def test_a_terminal(self) -> None:
        assert isinstance(open_view(console(80, 24)), LiveView)

    def test_a_pipe(self) -> None:
        assert isinstance(open_view(Console(file=io.StringIO())), LineView)

    def test_quiet(self) -> None:
        output = io.StringIO()
        clock = Clock()
        with open_view(Console(file=output), quiet=True) as view:
            play(view, clock, records(2))
        assert output.getvalue() == ""


class TestLines:
    def lines(self, output: io.StringIO) -> list[str]:
        return [line.partition("] ")[2] for line in output.getvalue().splitlines()]

    def test_phases_and_trials_one_line_each(self) -> None:
        output, clock = io.StringIO(), Clock()
        with LineView(Console(file=output, width=40), clock=clock) as view:
            play(view, clock, records(2))
        lines = self.lines(output)
        for name in PHASES[:-1]:
            assert sum(line.startswith(f"{name}: started") for line in lines) == 1
            assert sum(line.startswith(f"{name}: done in") for line in lines) == 1
        trials = [line for line in lines if line.startswith("trial ")]
        started = [line for line in trials if line.endswith("): started")]
        assert started[-1] == "trial 3fa9c1d2e0 (evolution): started"
        assert len(started) == len(records(2)) + 1
        trials = [line for line in trials if line not in started]
        assert len(trials) == len(records(2))
        assert trials[1].startswith(
            "trial uniform-int8 (baseline): quality 0.906, latency 2.4 ms (37%), "
            "size 23.6 MB (26%), over budget: latency +85%, size ×2.3"
        )
        assert trials[-1].startswith("trial bad0000099 (")
        assert trials[-1].endswith("): failed: the loss became NaN at step 99")

    def test_progress_about_every_ten_seconds(self) -> None:
        output, clock = io.StringIO(), Clock()
        view = LineView(Console(file=output), clock=clock)
        view.phase("library", 600)
        for done in range(1, 601):
            clock.now_s += 0.125
            view.advance(done)
        progress = [line for line in self.lines(output) if re.match(r"library: \d+/600", line)]
        assert len(progress) == 7
        assert progress[0] == "library: 80/600 (13%), ETA 1m05s"

    def test_long_trials_are_told_of_once_a_minute(self) -> None:
        output, clock = io.StringIO(), Clock()
        view = LineView(Console(file=output), clock=clock)
        clock.now_s = 1000.0
        view.trial_started("8a6bc403cb", "milp")
        for second in range(1, 151):
            clock.now_s += 1.0
            view.trial_advanced("8a6bc403cb", Activity("distil", second, 200))
        assert [line for line in self.lines(output) if line.startswith("running")] == [
            "running: 8a6bc403cb (milp, 1m00s, distil 30%)",
            "running: 8a6bc403cb (milp, 2m00s, distil 60%)",
        ]

    def test_no_colour_and_no_cursor_control(self) -> None:
        output, clock = io.StringIO(), Clock()
        with LineView(Console(file=output), clock=clock) as view:
            play(view, clock, records(4))
        assert "\x1b" not in output.getvalue()
