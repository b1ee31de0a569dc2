"""The records a study keeps: one per trial. Plain data, JSON in the ledger. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from autocomp.core.candidate import Candidate
from autocomp.core.measurement import Measurement

TrialKind = Literal["dense", "uniform", "search"]
TrialState = Literal["complete", "failed", "pruned"]


@dataclass(frozen=True)
class TrialRecord:
    """A trial as the ledger holds it.

    Attributes:
        id: stable, readable: `dense`, `uniform-int8`, or the first 10 digits of the candidate key.
            Baselines on further runtimes add the runtime's name: `dense-openvino`.
        kind: dense reference, uniform baseline or proposal of the search.
        proposed_by: `baseline`, `milp`, `evolution`, `random`; `surrogate` where a model of the
            trials so far expected it to add most to the front.
        quality: task metric of the exported artifact on the search split, higher is better.
        teacher_kl: mean KL(teacher ‖ artifact) on the search split, nats.
        metric: the metric's own name and value (`{"name": "perplexity", "value": 87.1}`).
        measured: cost of the artifact on the target; `None` until measured.
        estimated: what the cost table predicted before the trial ran.
        seconds: phase → duration (stitch, distil, export, evaluate, measure).
        artifact: directory of the exported model, relative to the study's.
        error: cause of a failed trial, first line readable by a person.
        by_machine: it failed because the machine did (memory, a worker that died), which says
            nothing about the candidate: a resumed search runs it again, once.
    """

    id: str
    kind: TrialKind
    proposed_by: str
    state: TrialState
    candidate: Candidate
    quality: float | None = None
    teacher_kl: float | None = None
    metric: Mapping[str, Any] = field(default_factory=dict)
    measured: Measurement | None = None
    estimated: Measurement | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    artifact: str | None = None
    error: str | None = None
    finished_at: str | None = None
    by_machine: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain mapping."""
        data = asdict(self)
        data["candidate"] = self.candidate.to_json()
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrialRecord:
        """Inverse of `to_json`."""
        fields = dict(data)
        fields["candidate"] = Candidate.from_json(fields["candidate"])
        for name in ("measured", "estimated"):
            if fields.get(name) is not None:
                fields[name] = Measurement.from_json(fields[name])
        return cls(**fields)


DENSE = "dense"
"""Id of the dense trial that relative limits refer to."""


def dense_reference(records: Iterable[TrialRecord]) -> TrialRecord | None:
    """The dense trial that relative limits refer to: the one on the first runtime."""
    dense = [record for record in records if record.kind == "dense"]
    return min(dense, key=lambda record: record.id != DENSE, default=None)
