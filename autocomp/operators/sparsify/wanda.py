"""Wanda: zero the weights with the smallest |weight| × norm of their input, row by row."""

from __future__ import annotations

from autocomp.core.candidate import Step
from autocomp.core.errors import InternalError
from autocomp.core.unit import Unit
from autocomp.operators.protocol import Need, UnitState, UnitStats
from autocomp.operators.sparsify.sparsifier import Sparsifier


class Wanda(Sparsifier):
    """Weights and activations; what stays is not changed."""

    name = "wanda"
    summary = "Set to zero the weights of each row that meet the least input."
    paper = "Sun et al., 2023, Wanda, arXiv:2306.11695"
    version = 1

    def needs(self, step: Step) -> frozenset[Need]:
        """The energy of each input."""
        return frozenset({"gram"})

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Mask every site by |W| · ‖x‖, compared within a row (of a group under N:M).

        Raises:
            ModelError: if a weight is not finite.
        """
        from autocomp.operators import gram
        from autocomp.operators.sparsify.masks import refuse_not_finite, row_mask, sparse_site

        formats = self.formats(unit, {name: site.format for name, site in state.items()}, step)
        result: UnitState = {}
        for name, site in state.items():
            if name not in stats:
                raise InternalError(f"wanda at {unit.name}: no calibration statistics for {name}")
            refuse_not_finite(name, site.weight)
            energy = stats[name].gram.diagonal()
            gram.refuse_not_finite(energy)
            if site.kept_columns is not None:
                energy = energy[site.kept_columns]
            scores = site.weight.abs() * energy.clamp_min(0.0).sqrt()
            mask = row_mask(scores, step["level"])
            result[name] = sparse_site(site, mask, site.weight, formats[name])
        return result


OPERATOR = Wanda()
