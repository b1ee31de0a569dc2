"""Measurements: a latency, a size, a peak memory, and where they come from. No torch.

Estimated figures (from a cost table) and measured ones (of the artifact on the target) are the
same shape with another `provenance`, and never share a column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Provenance = Literal["estimated", "measured"]
Clock = Literal["processor", "wall"]


def latency_clock(threads: int) -> Clock:
    """What a latency is counted in, by the workload's threads.

    The processor time of the process is a latency only on one thread, and does not count being
    preempted there; on several it is wall-clock time. Both are normalised by the anchor model.
    """
    return "processor" if threads == 1 else "wall"


@dataclass(frozen=True)
class Measurement:
    """Cost of one model on one target.

    Attributes:
        provenance: `measured` (the artifact on the target) or `estimated` (the cost table).
        latency_ms: on the clock of `latency_clock`, normalised by the anchor model; what budgets
            are held against. Of one run, or of one generated token where the workload generates.
        size_bytes: bytes on disk of the artifact.
        peak_memory_bytes: peak resident memory of a process that only loads and runs the artifact.
        latency_wall_ms: plain wall-clock median, for the record.
        latency_spread: relative half-width (p90 − p10) / (2·p50) of the repeated runs.
        device: fingerprint of the device it was measured on.
        prefill_ms: reading the prompt, where the workload generates; on the scale of `latency_ms`.
    """

    provenance: Provenance
    latency_ms: float | None
    size_bytes: int | None
    peak_memory_bytes: int | None = None
    latency_wall_ms: float | None = None
    latency_spread: float | None = None
    device: str | None = None
    prefill_ms: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain mapping."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        """Inverse of `to_json`."""
        return cls(**data)
