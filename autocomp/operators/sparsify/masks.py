"""Masks from scores, with an exact number of weights kept. Needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from autocomp.core.errors import ModelError
from autocomp.core.unit import SiteFormat
from autocomp.operators.protocol import SiteState
from autocomp.operators.sparsify.choices import Level, kept_per_row, pattern


def refuse_not_finite(name: str, weight: Tensor) -> None:
    """Raise ModelError if `weight` holds NaN or infinity."""
    if weight.numel() and not all(bool(torch.isfinite(e)) for e in torch.aminmax(weight)):
        raise ModelError(
            f"{name}.weight holds NaN or infinity: no weight can be told to matter more than "
            f"another. Fetch the model again, or fit the teacher at a lower learning rate"
        )


def row_mask(scores: Tensor, level: Level) -> Tensor:
    """True at the highest `scores (rows, columns)` of each row, or of each group of an N:M level.

    Of equal scores the first stay. Every row keeps `kept_per_row(level, columns)`.
    """
    found = pattern(level)
    if found is not None:
        return pattern_mask(scores, *found)
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    kept = kept_per_row(level, scores.shape[1])
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :kept]
    return mask.scatter_(1, order, torch.ones((), dtype=torch.bool).expand(order.shape))


def pattern_mask(scores: Tensor, kept: int, group: int) -> Tensor:
    """True at the `kept` highest of every `group` consecutive scores of a row `(rows, columns)`."""
    rows, columns = scores.shape
    padded = torch.nn.functional.pad(scores, (0, -columns % group), value=-torch.inf)
    grouped = padded.reshape(rows, -1, group)
    order = torch.sort(grouped, dim=2, descending=True, stable=True).indices[:, :, :kept]
    mask = torch.zeros(grouped.shape, dtype=torch.bool)
    mask.scatter_(2, order, torch.ones((), dtype=torch.bool).expand(order.shape))
    return mask.reshape(rows, -1)[:, :columns].contiguous()


def lowest_mask(scores: Tensor, count: int) -> Tensor:
    """True at the `count` lowest of all `scores`; of equal ones the first. Same shape."""
    flat = scores.reshape(-1)
    if count <= 0:
        return torch.zeros(scores.shape, dtype=torch.bool)
    if count >= len(flat):
        return torch.ones(scores.shape, dtype=torch.bool)
    limit = torch.kthvalue(flat, count).values
    below = flat < limit
    equal = (flat == limit).nonzero().flatten()
    below[equal[: count - int(below.sum())]] = True
    return below.reshape(scores.shape)


def before_sparsity(sites: Sequence[SiteState]) -> tuple[Tensor, Tensor | None]:
    """Weight before sparsity and mask of stacked sites, `(rows, columns)`; no mask: all dense."""
    weight = torch.cat([site.weight if site.origin is None else site.origin for site in sites])
    if all(site.mask is None for site in sites):
        return weight, None
    masks = [
        torch.ones(site.weight.shape, dtype=torch.bool) if site.mask is None else site.mask
        for site in sites
    ]
    return weight, torch.cat(masks)


def sparse_site(site: SiteState, mask: Tensor, weight: Tensor, format: SiteFormat) -> SiteState:
    """`site` with `weight` where `mask`, zero elsewhere; its weight until now is the origin."""
    if format.nonzeros is None:
        return replace(site, format=format)
    return replace(
        site,
        weight=torch.where(mask, weight, 0.0),
        mask=mask,
        origin=site.weight,
        format=format,
    )
