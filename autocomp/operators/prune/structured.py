"""Structured removal with compensation: choose groups of input columns, cut, re-fit. Needs torch.

Optimal brain surgeon on groups (Kurtic et al., 2023, ZipLM, arXiv:2302.04089): with H the damped
Gram matrix of a linear layer's input, removing the columns S and re-fitting the rest raises the
layer's output error by tr(W_S ([H⁻¹]_SS)⁻¹ W_Sᵀ). The cheapest group goes, W and H⁻¹ are updated,
and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from autocomp.core.errors import InternalError
from autocomp.core.unit import resized
from autocomp.operators.gram import compensate, damped, damping_for, derived, inverse
from autocomp.operators.protocol import SiteState, SiteStats, UnitState, UnitStats

ROUNDS = 64
"""Removing everything takes at most about this many updates of the full inverse."""

POOL = 4
"""Groups looked at for each one removed, within a round."""


class RemovalOrder:
    """Groups of `size` adjacent columns in the order they are removed; extended on demand.

    With few groups the greedy order is exact, in float64. With many, a round removes a batch: the
    cheapest `POOL` × batch groups are taken aside, the greedy order is exact among those, and the
    full inverse is updated once per round. The order does not depend on how far it is asked for.
    """

    def __init__(self, weight: Tensor, gram: Tensor, size: int, damping: float) -> None:
        """`weight (rows, columns)`, `gram (columns, columns)`."""
        self._size = size
        self._groups = weight.shape[1] // size
        self._batch = max(1, self._groups // ROUNDS)
        precision = torch.float64 if self._batch == 1 else torch.float32
        self._weight = weight.to(precision, copy=True)
        self._inverse = inverse(damped(gram, damping).to(precision))
        self._alive = torch.ones(self._groups, dtype=torch.bool)
        self._order: list[int] = []

    def first(self, count: int) -> list[int]:
        """The first `count` groups to remove."""
        while len(self._order) < count:
            self._round()
        return self._order[:count]

    def _round(self) -> None:
        scores = _scores(_blocks(self._weight, self._size), self._diagonal_blocks(), self._alive)
        alive = int(self._alive.sum())
        pool = alive if self._batch == 1 else min(alive, POOL * self._batch)
        candidates = torch.topk(scores, pool, largest=False, sorted=True).indices
        columns = self._columns(candidates)
        small = self._weight[:, columns]
        order = _greedy(
            small.t() @ small,
            self._inverse[columns][:, columns],
            self._size,
            min(self._batch, alive),
        )
        chosen = candidates[torch.tensor(order)]
        self._remove(self._columns(chosen))
        self._alive[chosen] = False
        self._order.extend(chosen.tolist())

    def _remove(self, columns: Tensor) -> None:
        rows = self._inverse[columns]
        mixing = _solve(rows[:, columns], rows)  # ([H⁻¹]_SS)⁻¹ [H⁻¹]_S
        self._weight.addmm_(self._weight[:, columns], mixing, alpha=-1)
        self._inverse.addmm_(rows.t().contiguous(), mixing, alpha=-1)

    def _diagonal_blocks(self) -> Tensor:
        if self._size == 1:
            return self._inverse.diagonal().reshape(-1, 1, 1)
        cut = self._inverse.reshape(self._groups, self._size, self._groups, self._size)
        return cut.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def _columns(self, groups: Tensor) -> Tensor:
        return (groups.unsqueeze(1) * self._size + torch.arange(self._size)).flatten()


def _blocks(weight: Tensor, size: int) -> Tensor:
    """W_Sᵀ W_S for every group, `(groups, size, size)`."""
    if size == 1:
        return weight.square().sum(dim=0).reshape(-1, 1, 1)
    cut = weight.reshape(weight.shape[0], -1, size).permute(1, 2, 0)  # (groups, size, rows)
    return cut @ cut.transpose(1, 2)


def _scores(moments: Tensor, blocks: Tensor, alive: Tensor) -> Tensor:
    """tr(B⁻¹ M) per group; infinite for those that are gone (their B is zero, but for rounding)."""
    if blocks.shape[1] == 1:
        scores = (moments / blocks.clamp_min(1e-30)).flatten()
    else:
        identity = torch.eye(blocks.shape[1], dtype=blocks.dtype)
        blocks = torch.where(alive[:, None, None], blocks, identity)
        scores = _solve(blocks, moments).diagonal(dim1=1, dim2=2).sum(dim=1)
    return scores.masked_fill(~alive, float("inf"))


def _solve(system: Tensor, right: Tensor) -> Tensor:
    """`system⁻¹ right` for positive (semi)definite `system (..., n, n)`, kept off singularity."""
    diagonal = system.diagonal(dim1=-2, dim2=-1)
    jitter = torch.finfo(system.dtype).eps * diagonal.mean(dim=-1, keepdim=True).clamp_min(1e-30)
    safe = system + torch.diag_embed(jitter.expand_as(diagonal))
    solution: Tensor = torch.linalg.solve(safe, right)
    return solution


def _greedy(moment: Tensor, inverse_: Tensor, size: int, count: int) -> list[int]:
    """Exact greedy order of `count` groups, given WᵀW and H⁻¹ on the columns of the pool."""
    groups = moment.shape[0] // size
    alive = torch.ones(groups, dtype=torch.bool)
    order: list[int] = []
    for _ in range(count):
        if size == 1:
            scores = moment.diagonal() / inverse_.diagonal().clamp_min(1e-30)
            scores = scores.masked_fill(~alive, float("inf"))
        else:
            cut = (groups, size, groups, size)
            scores = _scores(
                moment.reshape(cut).diagonal(dim1=0, dim2=2).permute(2, 0, 1),
                inverse_.reshape(cut).diagonal(dim1=0, dim2=2).permute(2, 0, 1),
                alive,
            )
        best = int(scores.argmin())
        order.append(best)
        alive[best] = False
        if len(order) < count:
            here = slice(best * size, (best + 1) * size)
            rows = inverse_[here]
            mixing = _solve(rows[:, here], rows)  # X: W' = W − W_S X
            across = moment[:, here] @ mixing
            moment = moment - across - across.t() + mixing.t() @ moment[here, here] @ mixing
            inverse_ = inverse_ - rows.t() @ mixing
    return order


def keep_groups(
    state: UnitState,
    site: str,
    *,
    group: int,
    keep: int,
    rows: Mapping[str, int],
    stats: UnitStats,
) -> UnitState:
    """Keep `keep` groups of `group` input columns of `site`, compensated; drop what fed the others.

    Args:
        rows: preceding site → rows that belong to one group (in every repetition of all groups).

    With a bias, inputs are centred first, which is least squares with an intercept: the bias takes
    over the mean of what was removed.
    """
    here = state[site]
    if site not in stats:
        raise InternalError(f"no calibration statistics for {site}")
    groups = here.weight.shape[1] // group
    damping = damping_for(here.weight.shape[1], stats[site].count)
    second_moment = _moment(stats[site], centred=here.bias is not None)
    order = derived(
        stats[site].gram,
        ("order", id(here.weight), here.weight._version, group, here.bias is not None),
        lambda: (here.weight, RemovalOrder(here.weight, second_moment, group, damping)),
    )[1]
    gone = torch.zeros(groups, dtype=torch.bool)
    gone[order.first(groups - keep)] = True
    kept_groups = (~gone).nonzero().flatten()
    kept = _members(kept_groups, group)
    result = dict(state)
    weight = compensate(here.weight, second_moment, kept, damping)
    bias = here.bias
    if bias is not None:
        mean = stats[site].mean
        bias = bias + here.weight @ mean - weight @ mean[kept]
    result[site] = replace(
        here,
        weight=weight,
        bias=bias,
        format=resized(here.format, columns=len(kept)),
        kept_columns=kept,
    )
    for name, size in rows.items():
        result[name] = _cut_rows(state[name], kept_groups, size, groups)
    return result


def _moment(stats: SiteStats, *, centred: bool) -> Tensor:
    def make() -> Tensor:
        return stats.gram - stats.count * torch.outer(stats.mean, stats.mean)

    return derived(stats.gram, ("moment", centred), make) if centred else stats.gram


def _cut_rows(state: SiteState, kept_groups: Tensor, size: int, groups: int) -> SiteState:
    repeats = state.weight.shape[0] // (size * groups)
    kept = torch.cat([_members(kept_groups + r * groups, size) for r in range(repeats)])
    return replace(
        state,
        weight=state.weight[kept],
        bias=None if state.bias is None else state.bias[kept],
        format=resized(state.format, rows=len(kept)),
    )


def _members(groups: Tensor, size: int) -> Tensor:
    return (groups.unsqueeze(1) * size + torch.arange(size)).flatten()
