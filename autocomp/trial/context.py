"""What a worker needs to evaluate candidates: plain data that crosses process boundaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.core.candidate import Runtime
from autocomp.core.gate import Gate
from autocomp.core.unit import Unit
from autocomp.spec.schema import Spec
from autocomp.targets import make_target

if TYPE_CHECKING:
    from autocomp.targets.protocol import Target


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
        references: runtime → the anchor's latency there, recorded once per study. The one runtime
            of a study without a choice is `None`.
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
    references: Mapping[Runtime, Mapping[str, Any]] = field(default_factory=dict)

    def target(self, runtime: Runtime) -> Target:
        """The target of a runtime, its figures comparable with the study's others."""
        return make_target(self.spec.target.on(runtime), self.gate, self.references.get(runtime))
