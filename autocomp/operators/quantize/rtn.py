"""RTN: round every weight to the nearest level. Needs no calibration; all that embeddings take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autocomp.core.candidate import Step
from autocomp.core.unit import SiteFormat, Unit
from autocomp.operators.protocol import Rule, Stage, UnitState, UnitStats
from autocomp.operators.quantize.choices import bit_steps, quantised_formats


class RoundToNearest:
    """Symmetric round-to-nearest; below 8 bits the scale minimises the squared weight error."""

    name = "rtn"
    summary = "Round weights to the nearest of 8, 4, 3 or 2 bits; no calibration."
    paper = ""
    choices = "bits.weights, bits.activations, bits.group (below 8 bits; 0: a whole row)"
    stage: Stage = "bits"
    version = 1
    speeds_up: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    shrinks: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")

    def options(self, unit: Unit, rule: Rule) -> Sequence[Step | None]:
        """Every combination of weight and activation bits the rule asks for."""
        return bit_steps(self.name, unit, rule.bits)

    def formats(
        self, unit: Unit, formats: Mapping[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        """Same shapes, fewer bits."""
        return quantised_formats(unit, formats, step)

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Round every site."""
        from autocomp.operators.quantize.finish import quantised_site
        from autocomp.operators.quantize.grid import round_to_grid, search_scales

        formats = self.formats(unit, {name: site.format for name, site in state.items()}, step)
        result: UnitState = {}
        for name, site in state.items():
            scales = search_scales(site.weight, formats[name])
            codes = round_to_grid(site.weight, scales, formats[name])
            result[name] = quantised_site(site, codes, scales, formats[name], step, stats.get(name))
        return result


OPERATOR = RoundToNearest()
