"""What methods without calibration have in common: scales from the weights, then rounding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from autocomp.core.candidate import Step
from autocomp.core.unit import SiteFormat, Unit
from autocomp.operators.protocol import Need, Rule, Stage, UnitState, UnitStats
from autocomp.operators.quantize.choices import bit_steps, quantised_formats, range_needs

if TYPE_CHECKING:
    from torch import Tensor


class Nearest(ABC):
    """An operator without what it is called and says of itself; tables take it too."""

    name: str
    choices = "bits.weights, bits.activations, bits.group (below 8 bits; 0: a whole row)"
    stage: Stage = "bits"
    speeds_up: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    shrinks: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    saves_memory: tuple[str, ...] = ()

    @abstractmethod
    def scales(self, weight: Tensor, format: SiteFormat) -> Tensor:
        """Scales `(rows, groups)` for `weight (rows, columns)`."""

    def options(self, unit: Unit, rule: Rule) -> Sequence[Step | None]:
        """Every combination of weight and activation bits the rule asks for."""
        return bit_steps(self.name, unit, rule.bits)

    def formats(
        self, unit: Unit, formats: Mapping[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        """Same shapes, fewer bits."""
        return quantised_formats(unit, formats, step)

    def needs(self, step: Step) -> frozenset[Need]:
        """Nothing but the range of static activations."""
        return range_needs(step)

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Round every site to its scales."""
        from autocomp.operators.quantize.finish import quantised_site
        from autocomp.operators.quantize.grid import round_to_grid

        formats = self.formats(unit, {name: site.format for name, site in state.items()}, step)
        result: UnitState = {}
        for name, site in state.items():
            scales = self.scales(site.weight, formats[name])
            codes = round_to_grid(site.weight, scales, formats[name])
            result[name] = quantised_site(site, codes, scales, formats[name], step, stats.get(name))
        return result
