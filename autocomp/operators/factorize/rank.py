"""Rank: linear layers (heads too) and word embeddings as products of two thin matrices.

A linear layer is truncated where its output on real inputs changes least (whitened SVD); a table
where its rows, weighted by how often each is used, change least. `ratio` is the share of the rank
at which the two factors hold as many weights as the matrix: 0.5 halves the bytes. Each of query,
key and value is factorised by itself: sharing their first factor holds as many weights at any
ratio, and could not be pruned, quantised or stored site by site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autocomp.core.candidate import Step
from autocomp.core.factors import factor_formats, first_of, second_of
from autocomp.core.unit import Role, Site, SiteFormat, Unit, dense_format
from autocomp.operators.protocol import Need, Rule, Stage, UnitState, UnitStats
from autocomp.operators.prune.choices import read_fractions

LEFT_OUT: tuple[Role, ...] = ("position",)
"""Sites that are not factorised: of an embedding unit, the positions."""

STEP = 8
"""Ranks are multiples of this, and at least this."""


def rank_for(format: SiteFormat, ratio: float) -> int | None:
    """The rank of a site at `ratio`; `None` where two factors would hold no fewer weights."""
    rows, columns = format.rows, format.columns
    rank = max(STEP, int(ratio * rows * columns / (rows + columns) / STEP + 0.5) * STEP)
    return rank if rank * (rows + columns) < rows * columns else None


class Rank:
    """Replace every site by two factors of `ratio` of the rank that saves nothing."""

    name = "rank"
    summary = "Split linear layers or word embeddings into two thin factors of low rank."
    paper = "Wang et al., 2024, SVD-LLM, arXiv:2403.07378"
    choices = "structure.rank: fractions of the rank at which nothing is saved"
    stage: Stage = "structure"
    version = 1
    speeds_up: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    shrinks: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    saves_memory: tuple[str, ...] = ()

    def options(self, unit: Unit, rule: Rule) -> Sequence[Step | None]:
        """One step per ratio that leaves another shape; `None` for 1.0 and where none saves."""
        if "rank" not in rule.structure:
            return []
        steps: dict[tuple[int | None, ...], Step | None] = {}
        for ratio in read_fractions(rule.structure["rank"], operator="rank", unit=unit.name):
            whole = dense_format(unit)
            ranks = tuple(_rank(site, whole[site.name], ratio) for site in unit.sites)
            if ratio == 1 or not any(ranks):
                ranks = (None,) * len(ranks)
            steps.setdefault(ranks, Step.of("rank", ratio=ratio) if any(ranks) else None)
        return list(steps.values())

    def formats(
        self, unit: Unit, formats: Mapping[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        """Two thin formats for each site that becomes smaller."""
        result: dict[str, SiteFormat] = {}
        for site in unit.sites:
            before = formats[site.name]
            rank = _rank(site, before, step["ratio"])
            if rank is None:
                result[site.name] = before
            else:
                first, second = factor_formats(before, rank)
                result[first_of(site.name)], result[second_of(site.name)] = first, second
        return result

    def needs(self, step: Step) -> frozenset[Need]:
        """Gram matrices of linear layers, counts of tables."""
        return frozenset({"gram", "rows"})

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Truncate every site where its output changes least.

        Raises:
            ModelError: if a weight is not finite, by name.
        """
        from autocomp.operators.factorize.low_rank import linear_factors, table_factors

        result: UnitState = {}
        for site in unit.sites:
            here = state[site.name]
            rank = _rank(site, here.format, step["ratio"])
            if rank is None:
                result[site.name] = here
                continue
            make = table_factors if site.table else linear_factors
            pair = make(site.name, here, rank, stats.get(site.name))
            result[first_of(site.name)], result[second_of(site.name)] = pair
        return result


def _rank(site: Site, format: SiteFormat, ratio: float) -> int | None:
    return rank_for(format, ratio) if site.role not in LEFT_OUT else None


OPERATOR = Rank()
