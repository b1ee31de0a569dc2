"""AWQ: scale input channels so that the weights that meet large inputs are rounded finely.

Sites that read one tensor (query, key, value) share the scale. It is applied to the inputs when the
model runs; where a norm comes right before, lowering folds it into the norm's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from autocomp.core.candidate import Step
from autocomp.core.unit import SiteFormat, Unit
from autocomp.operators.protocol import (
    Need,
    Rule,
    SiteState,
    SiteStats,
    Stage,
    UnitState,
    UnitStats,
)
from autocomp.operators.quantize.choices import (
    bit_steps,
    quantised_formats,
    range_needs,
    silent_at_tables,
)
from autocomp.operators.shared_inputs import shared_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from autocomp.operators.gram import Factor


class Awq:
    """Activation-aware scaling, then rounding: to nearest, or by GPTQ on the scaled inputs."""

    stage: Stage = "bits"
    version = 1
    choices = "bits.weights, bits.activations, bits.group (below 8 bits; 0: a whole row)"
    speeds_up: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    shrinks: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    saves_memory: tuple[str, ...] = ()

    def __init__(self, name: str, summary: str, paper: str, *, by_gptq: bool) -> None:
        self.name = name
        self.summary = summary
        self.paper = paper
        self._by_gptq = by_gptq

    def options(self, unit: Unit, rule: Rule) -> Sequence[Step | None]:
        """Every combination of weight and activation bits the rule asks for.

        Raises:
            UserError: at an embedding, unless the rule also names a method that needs no inputs.
        """
        if silent_at_tables(self.name, unit, rule.bits):
            return []
        return bit_steps(self.name, unit, rule.bits)

    def formats(
        self, unit: Unit, formats: Mapping[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        """Same shapes, fewer bits, scaled inputs."""
        linear = [name for name, form in formats.items() if not form.embedding]
        return quantised_formats(unit, formats, step, scaled=linear)

    def needs(self, step: Step) -> frozenset[Need]:
        """Gram matrices, and the range of static activations."""
        return range_needs(step).union({"gram"})

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Find the scale of every group of sites that share an input, and round.

        Raises:
            InternalError: if a site has no statistics.
        """
        from autocomp.operators.gram import derived
        from autocomp.operators.quantize.finish import quantised_site
        from autocomp.operators.quantize.scaling import ScaledSites, awq_scale

        formats = self.formats(unit, {name: site.format for name, site in state.items()}, step)
        result: UnitState = dict(state)
        for names in shared_inputs(self.name, unit, state, stats):
            entry, kept = stats[names[0]], state[names[0]].kept_columns
            gram = entry.gram if kept is None else entry.gram[kept][:, kept]
            members = [state[name] for name in names]
            sites = ScaledSites([one.weight for one in members], [formats[n] for n in names])

            def solve(
                members: list[SiteState] = members,
                sites: ScaledSites = sites,
                gram: Tensor = gram,
                entry: SiteStats = entry,
            ) -> tuple[ScaledSites, Tensor, list[tuple[Tensor, Tensor]]]:
                scale = awq_scale(sites, gram, entry.count)
                rounded = [
                    self._round(one, form, scale, gram, entry.count)
                    for one, form in zip(members, sites.formats, strict=True)
                ]
                return sites, scale, rounded

            # What is done to activations changes the format alone: such options share codes. The
            # weights are remembered too, so that their ids stay theirs.
            bits = tuple((f.weight_bits, f.group) for f in sites.formats)
            key = (self.name, bits, *((id(w), w._version) for w in sites.weights))
            _, scale, rounded = derived(entry.gram, key, solve)
            for name, (codes, scales) in zip(names, rounded, strict=True):
                result[name] = quantised_site(
                    state[name],
                    codes.clone(),
                    scales.clone(),
                    formats[name],
                    step,
                    entry,
                    scale.reciprocal(),
                )
        return result

    def _round(
        self, site: SiteState, form: SiteFormat, scale: Tensor, gram: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Codes and scales of a site on inputs divided by `scale`; a mask is held."""
        from autocomp.operators.gram import damping_for, derived, factorise
        from autocomp.operators.quantize.grid import round_to_grid, search_scales
        from autocomp.operators.quantize.solve import solve_columns
        from autocomp.operators.sparsify.masks import before_sparsity

        weight = site.weight * scale
        scales = search_scales(weight, form)
        if not self._by_gptq:
            return round_to_grid(weight, scales, form), scales  # zeros stay zero
        original, mask = before_sparsity([site])
        damping, reorder = damping_for(len(gram), count), mask is None

        def factor() -> Factor:
            inverse = scale.reciprocal()
            return factorise(inverse.unsqueeze(1) * gram * inverse, damping, reorder=reorder)

        # Remembered with the scale: one for the sites that share it.
        shared = derived(scale, ("factor", damping, reorder), factor)
        return solve_columns(original * scale, scales, shared, form, mask), scales


OPERATOR = Awq(
    "awq",
    "Scale input channels by what they carry, then round weights to 8, 4, 3 or 2 bits.",
    "Lin et al., 2023, AWQ, arXiv:2306.00978",
    by_gptq=False,
)
WITH_GPTQ = Awq(
    "awq_gptq",
    "Scale input channels as awq does, then round column by column as gptq does.",
    "Lin et al., 2023, AWQ, arXiv:2306.00978; Frantar et al., 2022, GPTQ, arXiv:2210.17323",
    by_gptq=True,
)
