"""A target's clock: runs timed against its anchor, alone on the machine while the gate is held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autocomp.core.gate import Gate
from autocomp.targets.timing import Timing, time_alone, time_interleaved, time_round_robin

Run = Callable[[], object]


@dataclass(frozen=True)
class Clock:
    """Times what a target runs; see `timing` for how.

    Attributes:
        anchor: runs the anchor once.
        gate: held by every timing.
        single_threaded: whether what is timed runs on one thread.
    """

    anchor: Run
    gate: Gate
    single_threaded: bool

    def time(self, run: Run, **settings: Any) -> Timing:
        """One run against the anchor; `settings` go to `time_interleaved`."""
        with self.gate.measuring():
            return time_interleaved(
                run, self.anchor, single_threaded=self.single_threaded, **settings
            )

    def time_all(self, runs: Sequence[Run], **settings: Any) -> list[Timing]:
        """Many runs against each other and the anchor; `settings` go to `time_round_robin`."""
        with self.gate.measuring():
            return time_round_robin(
                runs, self.anchor, single_threaded=self.single_threaded, **settings
            )

    def anchor_ms(self, seconds: float) -> float:
        """The anchor alone, at the machine's best within `seconds`."""
        with self.gate.measuring():
            return time_alone(self.anchor, single_threaded=self.single_threaded, seconds=seconds)
