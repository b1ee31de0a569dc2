"""GPTQ: round column by column, spreading each column's error over those still to come.

Sites that see the same input (query, key, value) are solved together: they share the factorised
Gram matrix and, rows being independent, one pass over the columns.
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


class Gptq:
    """GPTQ with activation order and static, error-minimising scales."""

    name = "gptq"
    summary = "Round weights to 8, 4, 3 or 2 bits; outputs on real inputs change least."
    paper = "Frantar et al., 2022, GPTQ, arXiv:2210.17323"
    choices = "bits.weights, bits.activations, bits.group (below 8 bits; 0: a whole row)"
    stage: Stage = "bits"
    version = 1
    speeds_up: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    shrinks: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    saves_memory: tuple[str, ...] = ()

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
        """Same shapes, fewer bits."""
        return quantised_formats(unit, formats, step)

    def needs(self, step: Step) -> frozenset[Need]:
        """Gram matrices, and the range of static activations."""
        return range_needs(step).union({"gram"})

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Solve every group of sites that share an input.

        Sparse sites are solved from the weight before sparsity, their mask held: one sweep makes
        up for what is dropped and what is rounded. It takes columns as they stand, as the sweep
        that chose the mask did: by falling input energy, the error is a fifth larger.
        """
        import torch

        from autocomp.operators.gram import derived, factor_of
        from autocomp.operators.quantize.finish import quantised_site
        from autocomp.operators.quantize.grid import search_scales
        from autocomp.operators.quantize.solve import solve_columns
        from autocomp.operators.sparsify.masks import before_sparsity

        formats = self.formats(unit, {name: site.format for name, site in state.items()}, step)
        result: UnitState = dict(state)
        for names in shared_inputs(self.name, unit, state, stats, formats):
            sites = [state[name] for name in names]
            kept, like = state[names[0]].kept_columns, formats[names[0]]

            def solve(
                sites: list[SiteState] = sites,
                kept: Tensor | None = kept,
                like: SiteFormat = like,
                site: SiteStats = stats[names[0]],
            ) -> tuple[list[SiteState], Tensor, Tensor]:
                scales = search_scales(torch.cat([one.weight for one in sites]), like)
                weight, mask = before_sparsity(sites)
                factor = factor_of(site, kept, reorder=mask is None)
                codes = solve_columns(weight, scales, factor, like, mask)
                return sites, codes, scales

            # Activation bits change the format alone: such options share codes. What is remembered
            # holds the weights, so that their ids stay theirs. A mask has weights of its own.
            used = ((id(one.weight), one.weight._version) for one in sites)
            key = ("gptq", like.weight_bits, like.group, *used)
            _, codes, scales = derived(stats[names[0]].gram, key, solve)
            start = 0
            for name in names:
                rows = slice(start, start + state[name].weight.shape[0])
                result[name] = quantised_site(
                    state[name],
                    codes[rows].clone(),
                    scales[rows].clone(),
                    formats[name],
                    step,
                    stats[name],
                )
                start = rows.stop
        return result


OPERATOR = Gptq()
