"""The two factors of a low-rank site: the statistics of each, and what they multiply to. Torch."""

from __future__ import annotations

import torch
from torch import Tensor

from autocomp.calibrate.stats import SiteStats, UnitStats
from autocomp.core.factors import factored_sites, first_of, second_of
from autocomp.core.unit import SiteFormat
from autocomp.operators.gram import derived
from autocomp.operators.protocol import SiteState, UnitState


def factor_stats(state: UnitState, stats: UnitStats) -> UnitStats:
    """`stats` with entries for the factors in `state`.

    `X.first` reads what X reads. `X.second` reads A x, where A is the weight of `X.first` as it is
    now: its Gram matrix is A G Aᵀ, its mean A μ, and its extremes those of the sample. The same
    object for the same A, so that what is derived from it is shared between options. The factors of
    a table have none.
    """
    result = dict(stats)
    for site in factored_sites(state):
        if site in stats and stats[site].rows is None:
            result[first_of(site)] = stats[site]
            result[second_of(site)] = _behind(state[first_of(site)].weight, stats[site])
    return result


def _behind(weight: Tensor, stats: SiteStats) -> SiteStats:
    def make() -> tuple[Tensor, SiteStats]:
        left = weight.double()
        gram = left @ stats.gram.double() @ left.t()
        mean = left @ stats.mean.double()
        if stats.sample is None:
            return weight, SiteStats(gram.float(), mean.float(), stats.count)
        sample = stats.sample @ weight.t()
        low, high = torch.aminmax(sample, dim=0)
        return weight, SiteStats(
            gram.float(), mean.float(), stats.count, low=low, high=high, sample=sample
        )

    return derived(stats.gram, ("behind", id(weight), weight._version), make)[1]


def multiplied(state: UnitState) -> UnitState:
    """The state with every pair of factors as the one dense weight they stand for."""
    result = dict(state)
    for site in factored_sites(state):
        first, second = result.pop(first_of(site)), result.pop(second_of(site))
        result[site] = _product(first, second)
    return result


def _product(first: SiteState, second: SiteState) -> SiteState:
    left, right = first.on_plain_inputs(), second.on_plain_inputs()
    weight = left @ right.t() if first.format.embedding else right @ left
    rows, columns = weight.shape
    form = SiteFormat(rows, columns, second.bias is not None, first.format.embedding)
    return SiteState(weight, second.bias, form, kept_columns=first.kept_columns)
