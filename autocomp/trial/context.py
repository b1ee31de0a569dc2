"""What a worker needs to evaluate candidates: plain data that crosses process boundaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocomp.core.gate import Gate
from autocomp.core.unit import Unit
from autocomp.spec.schema import Spec


@dataclass(frozen=True)
class TrialContext:
    """Everything resident in a worker is loaded from here.

    Attributes:
        spec: the study's spec.
        model_path: local directory of the source model (tokenizer or processor).
        teacher_path: directory of the teacher.
        skeleton_path: the graph every candidate is lowered from.
        study_path: the study's directory; the ledger and the artifacts are below it.
        library_path: root of the library.
        items: (unit name, option key) → key of the library item.
        units: the units of the model, in model order.
        gate: the measurement gate of this host.
        reference: the anchor's latency, recorded once per study.
    """

    spec: Spec
    model_path: Path
    teacher_path: Path
    skeleton_path: Path
    study_path: Path
    library_path: Path
    items: Mapping[tuple[str, str], str]
    units: tuple[Unit, ...]
    gate: Gate
    reference: Mapping[str, Any] | None = None
