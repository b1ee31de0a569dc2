"""Numerics on Gram matrices: damping, the factor GPTQ walks along, removal order, compensation.

A layer's output error on calibration inputs is quadratic in its weight: for weights W and Ŵ it is
tr((W−Ŵ) G (W−Ŵ)ᵀ), G = Σ x xᵀ. Everything here minimises that. Results that several options need
(8 and 4 bits; three widths) are kept with the Gram matrix they derive from and die with it. Needs
torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from autocomp.calibrate.stats import SiteStats
from autocomp.core.errors import InternalError

MIN_DAMPING, MAX_DAMPING = 0.01, 0.3
"""Share of a Gram matrix's mean diagonal that is added to its diagonal."""

logger = logging.getLogger(__name__)
T = TypeVar("T")

_derived: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def derived(gram: Tensor, key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """`make()`, computed once per (Gram matrix, key) and forgotten with the matrix."""
    if gram not in _derived:
        _derived[gram] = {}
    memory = cast(dict[Any, Any], _derived[gram])
    full_key = (gram._version, *key)
    if full_key not in memory:
        memory[full_key] = make()
    return cast(T, memory[full_key])


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Gram matrix H (damped, columns permuted by `order`).

    Attributes:
        upper: float32 `(n, n)` upper triangular U with H⁻¹ = Uᵀ U.
        order: int64 `(n,)`, columns by falling input energy ("activation order"), or as they are.
        dead: bool `(n,)`, in the original order: columns that never saw input.
    """

    upper: Tensor
    order: Tensor
    dead: Tensor


def refuse_not_finite(statistics: Tensor) -> None:
    """Raises: InternalError: if what was gathered holds NaN or infinity."""
    if not bool(torch.isfinite(statistics).all()):
        raise InternalError("calibration statistics are not finite: calibrate again")


def damping_for(columns: int, count: int) -> float:
    """How much to trust a Gram matrix of `columns` inputs estimated from `count` tokens.

    1% when tokens abound; more when they are few, or the fit follows their noise. On held-out
    tokens, this halves the error of compensation at a thousand tokens against a fixed 1%.
    """
    return min(max(0.3 * columns / max(count, 1), MIN_DAMPING), MAX_DAMPING)


def damped(gram: Tensor, damping: float = MIN_DAMPING) -> Tensor:
    """G + λI in G's precision, λ = `damping` × mean diagonal; a copy, positive definite.

    Columns without input get a diagonal of one mean; an all-zero matrix becomes the identity.
    """
    result = gram.clone()
    result.diagonal().add_(_shift(gram.diagonal(), damping))
    return result


def _shift(diagonal: Tensor, damping: float) -> Tensor:
    """What `damped` adds to a matrix's `diagonal`."""
    if not torch.isfinite(diagonal).all():
        raise InternalError("a Gram matrix is not finite: calibrate again")
    live = diagonal > 0
    mean = diagonal[live].mean() if bool(live.any()) else diagonal.new_ones(())
    return torch.where(live, damping * mean, mean)


def factorise(gram: Tensor, damping: float = MIN_DAMPING, *, reorder: bool = True) -> Factor:
    """The factor of `gram (n, n)`, columns by falling input energy unless not to `reorder`.

    H = R Rᵀ with R upper triangular (a Cholesky factorisation from the last column up) gives
    U = R⁻¹ with one factorisation and one triangular inverse. In float32; should that fail, in
    float64, then with ten times the damping, again and again. Three matrices of this size are held
    at once beside `gram`, no more: that of a wide layer is larger than its weight.
    """
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    if reorder:
        order = torch.argsort(diagonal, descending=True, stable=True)
    else:
        order = torch.arange(len(diagonal))
    precision, attempt = torch.float32, damping
    while True:
        shift = _shift(diagonal[order], attempt).flip(0)
        lower = _rearranged(gram, order.flip(0))
        lower.diagonal().add_(shift)
        lower, failed = torch.linalg.cholesky_ex(lower.to(precision))
        if not failed.item():
            root = lower.flip(0, 1)  # upper triangular, H = root rootᵀ
            del lower
            # Columns first, as the solver has it, and solved in place.
            upper = torch.eye(len(root), dtype=precision).t()
            torch.linalg.solve_triangular(root, upper, upper=True, out=upper)
            del root
            finite = all(bool(torch.isfinite(end)) for end in torch.aminmax(upper))
            if finite and bool((upper.diagonal() > 0).all()):
                return Factor(upper.float().contiguous(), order, dead)
        if precision == torch.float64:
            attempt *= 10
        precision = torch.float64
        if attempt > 1e6:
            raise InternalError("a Gram matrix cannot be factorised: calibrate again")
        logger.debug("factorising a Gram matrix again, damping %g", attempt)


def _rearranged(gram: Tensor, order: Tensor) -> Tensor:
    """`gram[order][:, order]`, rows a few at a time: indexing twice would hold it twice."""
    result = torch.empty_like(gram, memory_format=torch.contiguous_format)
    for rows, which in zip(torch.split(result, 512), torch.split(order, 512), strict=True):
        torch.index_select(gram[which], 1, order, out=rows)
    return result


def factor_of(stats: SiteStats, kept: Tensor | None = None, *, reorder: bool = True) -> Factor:
    """`factorise` on the kept columns, damped as the number of tokens asks for; remembered."""
    gram = stats.gram
    damping = damping_for(gram.shape[0], stats.count)
    key = ("factor", reorder, damping, None if kept is None else kept.numpy().tobytes())
    return derived(gram, key, lambda: factorise(_sub(gram, kept), damping, reorder=reorder))


def inverse(gram: Tensor) -> Tensor:
    """H⁻¹ of an already damped matrix, in its precision; float64 when float32 fails."""
    lower, failed = torch.linalg.cholesky_ex(gram)
    if failed.item():
        lower = torch.linalg.cholesky(gram.double())
    return torch.cholesky_inverse(lower).to(gram.dtype)


def compensate(weight: Tensor, gram: Tensor, kept: Tensor, damping: float = MIN_DAMPING) -> Tensor:
    """Least-squares weight `(rows, len(kept))` on the kept columns of `weight (rows, columns)`.

    Minimises the output error plus λ‖Ŵ − W_K‖²: W_K + W_R G_RK (G_KK + λI)⁻¹, in float64. Drawn
    towards the weight that was there, so that keeping everything changes nothing.
    """
    mask = torch.ones(weight.shape[1], dtype=torch.bool)
    mask[kept] = False
    removed = mask.nonzero().flatten()
    if len(removed) == 0:
        return weight[:, kept].clone()
    diagonal = gram.diagonal().double()
    live = diagonal[diagonal > 0]
    ridge = damping * live.mean() if len(live) else diagonal.new_ones(())
    system = gram[kept][:, kept].double()
    system.diagonal().add_(ridge)
    # Columns without input have no covariance either: a unit diagonal leaves them as they are.
    system.diagonal()[system.diagonal() <= 0] = 1.0
    target = weight[:, removed].double() @ gram[removed][:, kept].double()  # W_R G_RK
    lower, failed = torch.linalg.cholesky_ex(system)
    if failed.item():
        change = torch.linalg.lstsq(system, target.t(), driver="gelsd").solution
    else:
        change = torch.cholesky_solve(target.t(), lower)
    fitted: Tensor = weight[:, kept].double() + change.t()
    return fitted.to(weight.dtype)


def output_error(difference: Tensor, gram: Tensor) -> float:
    """tr(D G Dᵀ) for `difference (rows, columns)`."""
    return float(((difference @ gram) * difference).sum(dtype=torch.float64))


def _sub(gram: Tensor, kept: Tensor | None) -> Tensor:
    return gram if kept is None else gram[kept][:, kept]
