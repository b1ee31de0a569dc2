"""Magnitude: the smallest weights of every row become zero. Needs no calibration."""

from __future__ import annotations

from autocomp.core.candidate import Step
from autocomp.core.unit import Unit
from autocomp.operators.protocol import Need, UnitState, UnitStats
from autocomp.operators.sparsify.sparsifier import Sparsifier


class Magnitude(Sparsifier):
    """The smallest weights of every row, or of every group under N:M."""

    name = "magnitude"
    summary = "Set the smallest weights of each row to zero; no calibration."
    paper = "Han et al., 2015, Learning both weights and connections, arXiv:1506.02626"
    version = 1

    def needs(self, step: Step) -> frozenset[Need]:
        """Nothing."""
        return frozenset()

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Mask every site; the weights that stay are not changed.

        Raises:
            ModelError: if a weight is not finite.
        """
        from autocomp.operators.sparsify.masks import refuse_not_finite, row_mask, sparse_site

        formats = self.formats(unit, {name: site.format for name, site in state.items()}, step)
        result: UnitState = {}
        for name, site in state.items():
            refuse_not_finite(name, site.weight)
            mask = row_mask(site.weight.abs(), step["level"])
            result[name] = sparse_site(site, mask, site.weight, formats[name])
        return result


OPERATOR = Magnitude()
