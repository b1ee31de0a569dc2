"""SparseGPT: drop weights column by column, spreading each loss over the columns still to come.

Sites that see the same input (query, key, value) are swept together; each keeps its own count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autocomp.core.candidate import Step
from autocomp.core.errors import InternalError
from autocomp.core.unit import SiteFormat, Unit
from autocomp.operators.protocol import Rule, Stage, UnitState, UnitStats
from autocomp.operators.sparsify.choices import sparse_formats, sparsity_steps


class SparseGpt:
    """The mask is chosen as the sweep goes, 128 columns (a group under N:M) at a time."""

    name = "sparsegpt"
    summary = "Set weights to zero and let those that stay make up for them."
    paper = "Frantar & Alistarh, 2023, SparseGPT, arXiv:2301.00774"
    choices = "sparsity.levels (fractions of zeros, or N:M)"
    stage: Stage = "sparsity"
    version = 1
    speeds_up: tuple[str, ...] = ()
    shrinks: tuple[str, ...] = ("onnxruntime-cpu",)

    def options(self, unit: Unit, rule: Rule) -> Sequence[Step | None]:
        """A step per level."""
        return sparsity_steps(self.name, unit, rule.sparsity)

    def formats(
        self, unit: Unit, formats: Mapping[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        """Same shapes, fewer weights stored."""
        return sparse_formats(formats, step)

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
        together: dict[tuple[object, ...], list[str]] = {}
        for name, site in state.items():
            if name not in stats:
                raise InternalError(
                    f"sparsegpt at {unit.name}: no calibration statistics for {name}"
                )
            refuse_not_finite(name, site.weight)
            columns = None if site.kept_columns is None else tuple(site.kept_columns.tolist())
            together.setdefault((id(stats[name].gram), columns), []).append(name)
        result: UnitState = dict(state)
        for names in together.values():
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
