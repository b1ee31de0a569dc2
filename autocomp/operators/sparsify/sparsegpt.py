"""SparseGPT: drop weights column by column, spreading each loss over the columns still to come.

Sites that see the same input (query, key, value) are swept together; each keeps its own count.
"""

from __future__ import annotations

from autocomp.core.candidate import Step
from autocomp.core.unit import Unit
from autocomp.operators.protocol import Need, UnitState, UnitStats
from autocomp.operators.shared_inputs import shared_inputs
from autocomp.operators.sparsify.sparsifier import Sparsifier


class SparseGpt(Sparsifier):
    """The mask is chosen as the sweep goes, 128 columns (a group under N:M) at a time."""

    name = "sparsegpt"
    summary = "Set weights to zero and let those that stay make up for them."
    paper = "Frantar & Alistarh, 2023, SparseGPT, arXiv:2301.00774"
    version = 1

    def needs(self, step: Step) -> frozenset[Need]:
        """Gram matrices."""
        return frozenset({"gram"})

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Sweep every group of sites that share an input.

        Raises:
            ModelError: if a weight is not finite.
        """
        import torch

        from autocomp.operators.gram import factor_of
        from autocomp.operators.sparsify.masks import refuse_not_finite, sparse_site
        from autocomp.operators.sparsify.solve import solve_sparse

        formats = self.formats(unit, {name: site.format for name, site in state.items()}, step)
        for name, site in state.items():
            refuse_not_finite(name, site.weight)
        result: UnitState = dict(state)
        for names in shared_inputs(self.name, unit, state, stats):
            weights = [state[name].weight for name in names]
            factor = factor_of(stats[names[0]], state[names[0]].kept_columns, reorder=False)
            heights = [len(weight) for weight in weights]
            weight, mask = solve_sparse(torch.cat(weights), factor, step["level"], heights)
            start = 0
            for name, height in zip(names, heights, strict=True):
                rows = slice(start, start + height)
                result[name] = sparse_site(
                    state[name], mask[rows].clone(), weight[rows], formats[name]
                )
                start = rows.stop
        return result


OPERATOR = SparseGpt()
