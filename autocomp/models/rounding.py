"""Rounding of activations, with gradients that go straight through, and products of integers.

Activations are quantised as the runtime does it (ONNX's DynamicQuantizeLinear, or QuantizeLinear
where the range was fixed at calibration), so that what is evaluated here is what is shipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


def fake_quantise_per_tensor(x: torch.Tensor) -> torch.Tensor:
    """`x` through uint8 and back, asymmetric, one scale for all: ONNX's DynamicQuantizeLinear.

    The range always includes zero; a tensor of zeros comes back unchanged. Straight-through.
    """
    with torch.no_grad():
        scale, zero_point, _ = _dynamic_range(x)
        rounded = (x / scale).round_().clamp_(-zero_point, 255 - zero_point).mul_(scale)
    return straight_through(x, rounded)


def fake_quantise_static(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """`x` through uint8 and back on a fixed grid (`static_grid`): ONNX's QuantizeLinear.

    Straight-through inside the range; no gradient where `x` was clipped.
    """
    low, high = -zero_point, 255 - zero_point
    with torch.no_grad():
        steps = x / scale
        rounded = steps.round().clamp_(low, high).mul_(scale)
        mask = (steps >= low - 0.5) & (steps <= high + 0.5) if x.requires_grad else None
    return straight_through(x, rounded, mask)


def _dynamic_range(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale and zero point (0…255) of `x` as uint8, and `high - low`; scalars, float32."""
    if x.numel() == 0:
        return x.new_ones(()), x.new_zeros(()), x.new_zeros(())
    low, high = torch.aminmax(x)
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    span = high - low
    scale = span / 255.0
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (-low / scale).round_().clamp_(0, 255), span


@cache
def integer_products() -> bool:
    """Whether torch multiplies int8 matrices faster than float32 ones here (x86 with VNNI).

    Elsewhere `torch._int_mm` falls back to plain loops.
    """
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    fast = known.get("avx512_vnni") or known.get("avx_vnni") or known.get("amx_int8")
    onednn: Any = torch.backends.mkldnn
    return bool(fast) and bool(onednn.is_available())


@dataclass(frozen=True)
class Integers:
    """A weight as integer products want it.

    Attributes:
        codes: int8 `(rows, columns)`.
        sums: of each row of `codes`, float32 `(rows,)`.
        scales: float32 `(rows,)`; the weight is `codes * scales`.
    """

    codes: torch.Tensor
    sums: torch.Tensor
    scales: torch.Tensor


def integer_linear(
    x: torch.Tensor,
    weight: Integers,
    bias: torch.Tensor | None = None,
    grid: tuple[float, int] | None = None,
) -> torch.Tensor:
    """`linear(fake_quantise_per_tensor(x), codes * scales, bias)`, accumulated in integers.

    With `grid`, scale and zero point, it is `fake_quantise_static` instead.

    What the runtime computes, and several times faster than emulating it in float32. `x` is float32
    `(..., columns)`, `bias` `(rows,)`; gives float32 `(..., rows)`, not a number if `x` is not
    finite. No gradient.
    """
    scale: torch.Tensor | float
    zero_point: torch.Tensor | int
    if grid is None:
        scale, zero_point, span = _dynamic_range(x)
    else:
        (scale, zero_point), span = grid, x.sum()
    shift = zero_point - 128.0  # uint8 - 128 is int8
    inputs = (x / scale).round_().add_(shift).clamp_(-128, 127).to(torch.int8)
    products = torch._int_mm(inputs.reshape(-1, x.shape[-1]), weight.codes.t())
    steps = weight.scales * scale
    offset = weight.sums * steps * -shift + span * 0.0  # NaN does not survive as an integer
    if bias is not None:
        offset = offset + bias
    return torch.addcmul(offset, products.to(torch.float32), steps).view(*x.shape[:-1], -1)


class _StraightThrough(torch.autograd.Function):
    """Returns `rounded`, bit for bit; the gradient goes to `value` where `mask` allows it."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, rounded: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(*(() if mask is None else (mask,)))
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        if ctx.saved_tensors:
            gradient = gradient * ctx.saved_tensors[0]
        return gradient, None, None


def straight_through(
    value: torch.Tensor, rounded: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`rounded`, with the gradient going to `value` (Bengio et al., 2013) where `mask` allows."""
    if torch.is_grad_enabled() and value.requires_grad:
        through: torch.Tensor = _StraightThrough.apply(value, rounded, mask)  # type: ignore[no-untyped-call]
        return through
    return rounded
