"""SmoothQuant: move outliers from the activations into the weights, then take both in 8 bits.

The paper scales what comes out of a norm: the inputs of query, key and value, and of the first
layers of a feed-forward sublayer. The other sites are rounded as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autocomp.core.candidate import Step
from autocomp.core.errors import UserError
from autocomp.core.unit import SiteFormat, Unit
from autocomp.operators.protocol import Need, Rule, Stage, UnitState, UnitStats
from autocomp.operators.quantize.choices import (
    asks_for_bits,
    bit_steps,
    quantised_formats,
    reads_unit_input,
    silent_at_tables,
)
from autocomp.operators.shared_inputs import shared_inputs


class SmoothQuant:
    """8-bit weights and activations; the scale between them by `migration`."""

    name = "smoothquant"
    summary = "8-bit weights and activations; outliers of the inputs move into the weights."
    paper = "Xiao et al., 2022, SmoothQuant, arXiv:2211.10438"
    choices = "bits.weights: 8, bits.activations: 8 or static, bits.migration"
    stage: Stage = "bits"
    version = 1
    speeds_up: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    shrinks: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    saves_memory: tuple[str, ...] = ()

    def options(self, unit: Unit, rule: Rule) -> Sequence[Step | None]:
        """8-bit weights with each kind of 8-bit activations, for each migration strength.

        Other bits the rule names are for its other methods; units that read no norm take none.

        Raises:
            UserError: if the rule names no other method and no 8-bit weights and activations.
        """
        if silent_at_tables(self.name, unit, rule.bits):
            return []
        steps: dict[Step | None, None] = {}
        for step in bit_steps(self.name, unit, {**rule.bits, "per_site": False}):
            if step is None:
                steps[None] = None
            elif step["weights"] == 8 and step["activations"] == 8:
                for migration in _migrations(unit, rule):
                    steps[Step.of(self.name, **dict(step.args), migration=migration)] = None
        alone = rule.bits.get("method") in (self.name, [self.name])
        if alone and asks_for_bits(rule.bits) and not any(steps):
            raise UserError(
                f"smoothquant at {unit.name}: it makes weights and activations 8-bit, and the rule "
                f"asks for neither. Write bits: {{method: smoothquant, weights: [8], activations: "
                f"[8]}} (or activations: [static])"
            )
        return list(steps)

    def formats(
        self, unit: Unit, formats: Mapping[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        """Same shapes, 8 bits; scaled where the site reads what the unit reads."""
        scaled = [name for name in formats if reads_unit_input(unit, name)]
        return quantised_formats(unit, formats, step, scaled=scaled)

    def needs(self, step: Step) -> frozenset[Need]:
        """The reach of each input."""
        return frozenset({"range"})

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Scale the sites that share an input together, then round to nearest."""
        from autocomp.operators.quantize.finish import quantised_site
        from autocomp.operators.quantize.grid import round_to_grid, search_scales
        from autocomp.operators.quantize.scaling import reach_of, smooth_scale

        formats = self.formats(unit, {name: site.format for name, site in state.items()}, step)
        result: UnitState = dict(state)
        for names in shared_inputs(self.name, unit, state, stats):
            # A factor may share its input with sites that are not scaled: each as its format says.
            for scaled in (True, False):
                chosen = [name for name in names if formats[name].scaled is scaled]
                if not chosen:
                    continue
                scale = None
                if scaled:
                    kept = state[chosen[0]].kept_columns
                    weights = [state[name].weight for name in chosen]
                    reach = reach_of(stats[chosen[0]], kept)
                    scale = smooth_scale(weights, reach, step["migration"])
                for name in chosen:
                    weight = state[name].weight if scale is None else state[name].weight * scale
                    scales = search_scales(weight, formats[name])
                    result[name] = quantised_site(
                        state[name],
                        round_to_grid(weight, scales, formats[name]),
                        scales,
                        formats[name],
                        step,
                        stats[name],
                        None if scale is None else scale.reciprocal(),
                    )
        return result


def _migrations(unit: Unit, rule: Rule) -> list[float]:
    """Strengths, each from 0 to 1."""
    choices = rule.bits.get("migration", [0.5])
    for choice in choices:
        if isinstance(choice, bool) or not isinstance(choice, int | float) or not 0 <= choice <= 1:
            raise UserError(
                f"smoothquant at {unit.name}: bits.migration {choice!r} is not supported. Allowed: "
                f"0 (all in the activations) to 1 (all in the weights); 0.5 is usual"
            )
    return [float(choice) for choice in choices]


OPERATOR = SmoothQuant()
