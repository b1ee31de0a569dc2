"""What an exporter is: it writes the model of a trial in one format and verifies it by reload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from autocomp.core.measurement import Measurement
from autocomp.export.companions import Companions
from autocomp.front.noise import Interval
from autocomp.spec.schema import Spec
from autocomp.study.records import TrialRecord
from autocomp.targets.protocol import Artifact, Target


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    Attributes:
        spec: the study's spec.
        record: the chosen trial: complete and measured.
        artifact: its exported model.
        companions: tokenizer or processor files, labels and example inputs of the study.
        dense: the dense trial, for the card.
        report: what the report split said, if it was opened for this trial (`report` of
            `autocomp front --json`).
        student: where the trial's torch weights are, for formats that are not the runtime's own;
            the file may be missing.
        interval: of the quality on the search split, if there are per-example scores.
    """

    spec: Spec
    record: TrialRecord
    artifact: Artifact
    companions: Companions
    dense: TrialRecord | None
    report: Mapping[str, Any] | None
    student: Path | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class Verification:
    """What reloading showed.

    Attributes:
        max_difference: largest absolute difference of the reloaded model's logits from what the
            format promises: the artifact's that was evaluated, or those of its weights as floats.
        size_bytes: bytes of the model on disk.
        measured: cost, measured again; `None` where the study's target does not run the format.
    """

    max_difference: float
    size_bytes: int
    measured: Measurement | None

    def to_json(self) -> dict[str, Any]:
        """Plain mapping."""
        return {
            "max_difference": self.max_difference,
            "size_bytes": self.size_bytes,
            "measured": None if self.measured is None else self.measured.to_json(),
        }


class Exporter(Protocol):
    """An export format.

    Call sequence: `supports` → `write` → `verify`. `write` leaves a whole directory or nothing.
    `expresses` says, for `autocomp ls exporters`, which candidates it can write.
    """

    name: str
    summary: str
    expresses: str

    def supports(self, record: TrialRecord) -> str | None:
        """`None` if this format can express the trial's candidate, else the reason it cannot."""
        ...

    def write(self, request: ExportRequest, directory: Path) -> None:
        """Write the model, tokenizer or processor, `candidate.yaml` and the card.

        Raises:
            UserError: if `directory` exists and is not empty, or the format cannot express the
                model, naming the unit.
            StudyError: if the format needs the trial's torch weights and they are not there.
            StorageError: if the disk is full.
        """
        ...

    def verify(self, request: ExportRequest, directory: Path, target: Target) -> Verification:
        """Reload from `directory`, compare outputs with the trial's, measure again if it can.

        Outputs are those of a process of its own, which has what the card asks for and no more.

        Raises:
            InternalError: if outputs differ or the size on disk is not the measured one.
        """
        ...
