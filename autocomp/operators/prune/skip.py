"""Skip: drop a whole sublayer; the residual stream passes it by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autocomp.core.candidate import Step
from autocomp.core.errors import UserError
from autocomp.core.unit import SiteFormat, Unit
from autocomp.operators.protocol import Need, Rule, Stage, UnitState, UnitStats


class Skip:
    """Drop the sublayer. Of post-norm blocks the normalisation stays."""

    name = "skip"
    summary = "Drop a whole attention or feed-forward sublayer."
    paper = "Fan et al., 2020, Reducing Transformer Depth on Demand, arXiv:1909.11556"
    choices = "structure.skip: true"
    stage: Stage = "structure"
    version = 1
    speeds_up: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    shrinks: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    saves_memory: tuple[str, ...] = ()

    def options(self, unit: Unit, rule: Rule) -> Sequence[Step | None]:
        """Leave it or skip it, where the rule says `skip: true`.

        Raises:
            UserError: if the unit cannot be skipped.
        """
        if not rule.structure.get("skip", False):
            return []
        if not unit.skippable:
            raise UserError(
                f"skip at {unit.name}: this unit ({unit.kind}) cannot be skipped. Skippable are "
                f"attention and ffn units: match layers.*.attention or layers.*.ffn"
            )
        return [None, Step.of("skip")]

    def formats(
        self, unit: Unit, formats: Mapping[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        """Nothing is left."""
        return {}

    def needs(self, step: Step) -> frozenset[Need]:
        """Nothing."""
        return frozenset()

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Nothing is left."""
        return {}


OPERATOR = Skip()
