"""Truncation where it costs least: whitened SVD of linear layers, weighted SVD of tables.

With G = L Lᵀ the damped Gram matrix of a layer's inputs, the output error of Ŵ is ‖(W − Ŵ) L‖², so
the best Ŵ of rank r is the truncated SVD of W L, times L⁻¹ (Wang et al., 2024, SVD-LLM,
arXiv:2403.07378). With a bias the inputs are centred first and the bias takes over the mean of what
is lost: least squares with an intercept. The rows of a table are weighted by how often they are
used. What all ranks share is kept with the Gram matrix. Needs torch.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from autocomp.calibrate.stats import SiteStats
from autocomp.core.errors import InternalError, ModelError
from autocomp.core.factors import factor_formats
from autocomp.operators.gram import damping_for, derived
from autocomp.operators.protocol import SiteState

Spectrum = tuple[Tensor, Tensor]
"""`left (rows, k)` and `right (k, columns)`, best first, √σ on either side: their first r columns
and rows multiply to the best matrix of rank r."""


def linear_factors(
    name: str, site: SiteState, rank: int, stats: SiteStats | None
) -> tuple[SiteState, SiteState]:
    """The two layers that stand for a linear layer.

    Raises:
        InternalError: without statistics.
        ModelError: if the weight is not finite.
    """
    if stats is None:
        raise InternalError(f"rank at {name}: no calibration statistics")
    weight, gram = site.weight, stats.gram
    _check_finite(name, weight)
    centred = site.bias is not None
    key = ("spectrum", id(weight), weight._version, centred)

    def make() -> tuple[Tensor, Spectrum]:
        second_moment = gram.double()
        if centred:
            mean = stats.mean.double()
            second_moment = second_moment - stats.count * torch.outer(mean, mean)
        return weight, spectrum(weight, second_moment, damping_for(len(gram), stats.count))

    first, second = _cut(derived(gram, key, make)[1], rank)
    bias = site.bias
    if bias is not None:
        mean = stats.mean.double()
        lost = weight.double() @ mean - second.double() @ (first.double() @ mean)
        bias = bias + lost.to(bias.dtype)
    formats = factor_formats(site.format, rank)
    return (
        replace(site, weight=first, bias=None, format=formats[0]),
        SiteState(weight=second, bias=bias, format=formats[1]),
    )


def table_factors(
    name: str, site: SiteState, rank: int, stats: SiteStats | None
) -> tuple[SiteState, SiteState]:
    """The narrow table and the layer behind it that stand for a table.

    Raises:
        ModelError: if the table is not finite.
    """
    table = site.weight
    _check_finite(name, table)
    basis = table_basis(table, None if stats is None else stats.rows)[:, :rank].contiguous()
    formats = factor_formats(site.format, rank)
    return (
        replace(site, weight=table @ basis, format=formats[0]),
        SiteState(weight=basis, bias=None, format=formats[1]),
    )


def spectrum(weight: Tensor, gram: Tensor, damping: float) -> Spectrum:
    """Of `weight (rows, columns)` under inputs with second moments `gram`; in float64 inside.

    Only as many terms are kept as can save weights.
    """
    root = cholesky(gram.double(), damping)
    left, values, right = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    useful = math.ceil(weight.numel() / sum(weight.shape))
    scale = values[:useful].sqrt()
    behind = torch.linalg.solve_triangular(
        root, scale[:, None] * right[:useful], upper=False, left=False
    )
    return (left[:, :useful] * scale).float(), behind.float()


def table_basis(table: Tensor, seen: Tensor | None) -> Tensor:
    """Orthonormal `(columns, columns)`, best first, onto which the rows of a table are projected.

    The weighted squared error of projecting onto the first r is the least of all tables of rank r.
    Rows are weighted by one more than how often they were `seen`, int64 `(rows,)`: a row that was
    not may still come.
    """
    weights = torch.ones(len(table), dtype=torch.float64)
    if seen is not None:
        weights = weights + seen.double()
    moments = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64)
    for rows, share in zip(torch.split(table, 4096), torch.split(weights, 4096), strict=True):
        moments += rows.double().t() @ (rows.double() * share[:, None])
    _, vectors = torch.linalg.eigh(moments)
    best_first: Tensor = vectors.flip(1).float()
    return best_first


def cholesky(gram: Tensor, damping: float) -> Tensor:
    """Lower triangular L with L Lᵀ = G + λI, λ = `damping` × mean diagonal; more if it must be.

    An all-zero matrix becomes the identity.

    Raises:
        InternalError: if the matrix is not finite.
    """
    if not bool(torch.isfinite(gram).all()):
        raise InternalError("a Gram matrix is not finite: calibrate again")
    mean = float(gram.diagonal().clamp_min(0).mean())
    if mean <= 0:
        return torch.eye(len(gram), dtype=gram.dtype)
    while True:
        shifted = gram.clone()
        shifted.diagonal().add_(damping * mean)
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(shifted)
        if not failed.item():
            return root
        damping *= 10  # rounding left it indefinite


def _cut(whole: Spectrum, rank: int) -> tuple[Tensor, Tensor]:
    """First and second factor of this rank, `(rank, columns)` and `(rows, rank)`."""
    left, right = whole
    return right[:rank].contiguous(), left[:, :rank].contiguous()


def _check_finite(name: str, weight: Tensor) -> None:
    if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(weight)):
        raise ModelError(f"{name}.weight holds NaN or infinity: it has no factors")
