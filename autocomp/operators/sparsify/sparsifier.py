"""What the methods of sparsity have in common: their levels and formats. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autocomp.core.candidate import Step
from autocomp.core.unit import SiteFormat, Unit
from autocomp.operators.protocol import Rule, Stage
from autocomp.operators.sparsify.choices import sparse_formats, sparsity_steps


class Sparsifier:
    """An operator without a name, a version and `apply`."""

    name: str
    choices = "sparsity.levels (fractions of zeros, or N:M)"
    stage: Stage = "sparsity"
    speeds_up: tuple[str, ...] = ()
    shrinks: tuple[str, ...] = ("onnxruntime-cpu",)
    saves_memory: tuple[str, ...] = ()

    def options(self, unit: Unit, rule: Rule) -> Sequence[Step | None]:
        """A step per level."""
        return sparsity_steps(self.name, unit, rule.sparsity)

    def formats(
        self, unit: Unit, formats: Mapping[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        """Same shapes, fewer weights stored."""
        return sparse_formats(formats, step)
