"""Timing by ratio: a model's runs interleaved with an anchor's, compared in the same quantiles.

With one thread the clock is the process's CPU time, which does not count being preempted; the
fast end of the runs (10th to 25th percentile) leaves out those whose caches a neighbour emptied;
what remains, such as a clock that slows down under load, hits the anchor alike and cancels.
With several threads CPU time is no latency: wall time is used, interleaved and normalised alike.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from autocomp.core.files import write_text_atomic

ROUNDS = 80
"""Runs of each graph in a round robin."""

CHUNK = 4
"""Runs of one model in a row: the first refills the caches, the others are warm."""

DISTURBED = 1.05
"""So many times its own time says that an anchor is disturbed; a model beside it costs 2 to 3%."""
ATTEMPTS = 3
PAUSE_S = 1.0


@dataclass(frozen=True)
class Timing:
    """What interleaved timing found.

    Attributes:
        ratio: model over anchor, both in the same quantiles.
        anchor_ms: the anchor in that time; drifts with the machine's state.
        wall_ms: median wall-clock time of the model's runs (by the clock in use in a round robin).
        spread: (p90 − p10) / (2 · p50) of the model's runs.
        runs: how many runs of the model were timed.
    """

    ratio: float
    anchor_ms: float
    wall_ms: float
    spread: float
    runs: int


@dataclass(frozen=True)
class Reference:
    """How long the anchor takes on an undisturbed device: turns ratios into milliseconds.

    A study records it once, so that all its figures are on one scale.
    """

    anchor_ms: float
    device: str

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        write_text_atomic(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Inverse of `save`."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def fast_mean(durations: Sequence[float]) -> float:
    """Mean of the 10th to 25th percentile."""
    ordered = sorted(durations)
    low = int(0.10 * len(ordered))
    high = max(low + 1, math.ceil(0.25 * len(ordered)))
    return statistics.fmean(ordered[low:high])


def time_alone(function: Callable[[], object], *, single_threaded: bool, seconds: float) -> float:
    """Milliseconds of the fastest of ten bursts (each by its `fast_mean`) within `seconds`."""
    clock = time.process_time_ns if single_threaded else time.perf_counter_ns
    bursts = []
    for _ in range(10):
        durations: list[float] = []
        end = time.perf_counter() + seconds / 10
        while len(durations) < 4 or time.perf_counter() < end:
            started = clock()
            function()
            durations.append((clock() - started) / 1e6)
        bursts.append(fast_mean(durations))
    return min(bursts)


def time_interleaved(
    model: Callable[[], object],
    anchor: Callable[[], object],
    *,
    single_threaded: bool,
    runs: int = 40,
    rounds: int = 6,
    seconds: float = 0.5,
    seed: int = 0,
) -> Timing:
    """Time `model` against `anchor`.

    At least `runs` runs of the model, more while it has run less than `seconds` (up to ten times
    as many), spread over `rounds` rounds in which chunks of both come in shuffled order.
    """
    clock = time.process_time_ns if single_threaded else time.perf_counter_ns
    once = math.inf
    for _ in range(3):
        anchor()
        started = time.perf_counter()
        model()
        once = min(once, max(time.perf_counter() - started, 1e-6))
    wanted = min(max(runs, int(seconds / once)), 10 * runs)
    chunks = max(1, math.ceil(wanted / (rounds * CHUNK)))
    rng = random.Random(seed)
    taken: dict[bool, list[float]] = {True: [], False: []}
    wall: list[float] = []
    for _ in range(rounds):
        order = [True] * chunks + [False] * max(2, min(chunks, 8))
        rng.shuffle(order)
        for is_model in order:
            function = model if is_model else anchor
            for _ in range(CHUNK):
                began, started = time.perf_counter_ns(), clock()
                function()
                taken[is_model].append((clock() - started) / 1e6)
                if is_model:
                    wall.append((time.perf_counter_ns() - began) / 1e6)
    ordered = sorted(taken[True])
    deciles = statistics.quantiles(ordered, n=10)
    anchor_ms = fast_mean(taken[False])
    return Timing(
        ratio=fast_mean(ordered) / anchor_ms,
        anchor_ms=anchor_ms,
        wall_ms=statistics.median(wall),
        spread=(deciles[-1] - deciles[0]) / (2 * deciles[4]),
        runs=len(ordered),
    )


def undisturbed(timed: Callable[[], Timing], anchor_ms: float) -> Timing:
    """The timing with the fastest anchor, of up to `ATTEMPTS` until one is near `anchor_ms`.

    Where the anchor takes longer than when the reference was recorded, something runs that does not
    know the gate. A model that mostly waits for memory loses less by it than the anchor, so that
    its ratio comes out too small.
    """
    timings = [timed()]
    while timings[-1].anchor_ms > DISTURBED * anchor_ms and len(timings) < ATTEMPTS:
        time.sleep(PAUSE_S)
        timings.append(timed())
    return min(timings, key=lambda timing: timing.anchor_ms)


def time_round_robin(
    runs: Sequence[Callable[[], object]],
    anchor: Callable[[], object],
    *,
    single_threaded: bool,
    rounds: int = ROUNDS,
    warm: int = 0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Timing]:
    """Time many small graphs at once: every round runs each of them once, in shuffled order.

    Each run finds its caches emptied by the others, as a sublayer does inside a model, and all
    share the machine's good and bad moments, so their proportions hold. Where a runtime compiles
    code for every graph, it is that code which is cold, though a whole model runs the same code in
    every layer: `warm` runs that are not timed come first.
    """
    clock = time.process_time_ns if single_threaded else time.perf_counter_ns
    rng = random.Random(seed)
    order = list(range(len(runs))) + [-1] * max(3, len(runs) // 6)
    taken: dict[int, list[float]] = {index: [] for index in order}
    for done in range(-2, rounds):
        if progress is not None and done >= 0:
            progress(done, rounds)
        rng.shuffle(order)
        for index in order:
            function = anchor if index < 0 else runs[index]
            for _ in range(warm):
                function()
            started = clock()
            function()
            if done >= 0:
                taken[index].append((clock() - started) / 1e6)
    anchor_ms = fast_mean(taken[-1])
    timings = []
    for index in range(len(runs)):
        deciles = statistics.quantiles(taken[index], n=10)
        timings.append(
            Timing(
                ratio=fast_mean(taken[index]) / anchor_ms,
                anchor_ms=anchor_ms,
                wall_ms=deciles[4],
                spread=(deciles[-1] - deciles[0]) / (2 * max(deciles[4], 1e-9)),
                runs=rounds,
            )
        )
    return timings
