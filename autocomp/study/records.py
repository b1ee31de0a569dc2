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
        proposed_by: `baseline`; how the search came upon the architecture: `milp`, `evolution`,
            `random`, `surrogate` where the model of screening KL chose among children, `regular`
            for a regular shape; `gain` where it was expected to diverge least after training,
            `front` where it was expected to add most to the front.
        quality: task metric of the exported artifact on the search split, higher is better.
        teacher_kl: mean KL(teacher ‖ artifact) on the search split, nats.
        metric: the metric's own name and value (`{"name": "perplexity", "value": 87.1}`).
        measured: cost of the artifact on the target; `None` until measured.
        estimated: what the cost table predicted before the trial ran.
        seconds: phase → duration (stitch, rung, distil, export, evaluate, measure).
        artifact: directory of the exported model, relative to the study's.
        rungs: what was seen of it on the way, `RungRecord.seen`, the earliest first.
        undone: its training led away from the teacher (KL on the search split, in torch), so that
            the artifact is that of the model as it was stitched.
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
    rungs: tuple[Mapping[str, Any], ...] = ()
    undone: bool = False
    error: str | None = None
    finished_at: str | None = None
    by_machine: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain mapping."""
        data = asdict(self)
        data["candidate"] = self.candidate.to_json()
        data["rungs"] = list(self.rungs)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrialRecord:
        """Inverse of `to_json`."""
        fields = dict(data)
        fields["candidate"] = Candidate.from_json(fields["candidate"])
        for name in ("measured", "estimated"):
            if fields.get(name) is not None:
                fields[name] = Measurement.from_json(fields[name])
        fields["rungs"] = tuple(fields.get("rungs", ()))
        return cls(**fields)


@dataclass(frozen=True)
class RungRecord:
    """A trial in training, looked at: the model as it is then, not exported.

    Attributes:
        id, kind, proposed_by, candidate, estimated: of the trial, see `TrialRecord`.
        rung: 0 for the first.
        tokens: distillation tokens seen so far.
        quality, teacher_kl: on the search split, as in `TrialRecord` but of the model in torch.
        seconds: phase → duration so far.
    """

    id: str
    kind: TrialKind
    proposed_by: str
    candidate: Candidate
    estimated: Measurement | None
    rung: int
    tokens: int
    quality: float | None
    teacher_kl: float | None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Of its entry in the ledger: `3f2a91c0b7@0`."""
        return f"{self.id}@{self.rung}"

    @property
    def seen(self) -> dict[str, Any]:
        """What a trial's record keeps of it."""
        names = ("rung", "tokens", "quality", "teacher_kl")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> dict[str, Any]:
        """Plain mapping."""
        return {**asdict(self), "candidate": self.candidate.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RungRecord:
        """Inverse of `to_json`."""
        fields = dict(data)
        fields["candidate"] = Candidate.from_json(fields["candidate"])
        if fields["estimated"] is not None:
            fields["estimated"] = Measurement.from_json(fields["estimated"])
        return cls(**fields)


DENSE = "dense"
"""Id of the dense trial that relative limits refer to."""


def dense_reference(records: Iterable[TrialRecord]) -> TrialRecord | None:
    """The dense trial that relative limits refer to: the one on the first runtime."""
    dense = [record for record in records if record.kind == "dense"]
    return min(dense, key=lambda record: record.id != DENSE, default=None)
