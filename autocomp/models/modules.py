"""The modules a compressed model is made of: quantised linear layers and tables, skipped sublayers.

Weights are symmetric: `codes = clamp(round(weight / scale))` with −127…127 at 8 bits and −8…7 at 4,
one scale per row, or per `group` consecutive columns of a row (the last group may be shorter). The
float `weight` stays trainable: the forward pass rounds it, the backward pass goes straight through
(Bengio et al., 2013, arXiv:1308.3432), clipped outside the range. Activations are quantised as the
runtime does it, so that what is evaluated here is what is shipped.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from autocomp.core.unit import SiteFormat

CODE_RANGE: dict[int, tuple[int, int]] = {8: (-127, 127), 4: (-8, 7)}
"""Weight bits → smallest and largest code."""


_TINY = 1e-36
"""Blocks of activations up to here count as zero: 127 / x would overflow float32."""


def group_size(format: SiteFormat) -> int:
    """Columns that share a scale: the whole row when `format.group` is `None`."""
    return format.group or format.columns


def group_count(format: SiteFormat) -> int:
    """Scales per row."""
    return -(-format.columns // group_size(format))


def expand_scales(scales: torch.Tensor, columns: int, group: int) -> torch.Tensor:
    """Scales `(rows, groups)` so that they broadcast against `(rows, columns)`."""
    if scales.shape[-1] == 1:
        return scales
    return scales.repeat_interleave(group, dim=-1)[..., :columns]


def quantise(weight: torch.Tensor, scales: torch.Tensor, format: SiteFormat) -> torch.Tensor:
    """Codes of `weight`, as float, in the shape of `weight` `(..., columns)`; round half to even.

    `scales` is `(..., groups)`. A group whose scale is zero gets code zero.
    """
    low, high = CODE_RANGE[format.weight_bits]
    steps = expand_scales(scales, weight.shape[-1], group_size(format))
    divisor = torch.where(steps > 0, steps, torch.inf)
    return (weight / divisor).round_().clamp_(low, high)


def dequantise(codes: torch.Tensor, scales: torch.Tensor, format: SiteFormat) -> torch.Tensor:
    """`codes * scale`, float32, in the shape of `codes` `(..., columns)`."""
    steps = expand_scales(scales, codes.shape[-1], group_size(format))
    return codes.to(torch.float32) * steps


def fake_quantise_per_tensor(x: torch.Tensor) -> torch.Tensor:
    """`x` through uint8 and back, asymmetric, one scale for all: ONNX's DynamicQuantizeLinear.

    The range always includes zero; a tensor of zeros comes back unchanged. Straight-through.
    """
    with torch.no_grad():
        low = x.amin().clamp_max(0.0) if x.numel() else x.new_zeros(())
        high = x.amax().clamp_min(0.0) if x.numel() else x.new_zeros(())
        scale = (high - low) / 255.0
        scale = torch.where(scale > 0, scale, 1.0)
        zero_point = (-low / scale).round().clamp(0, 255)
        codes = (x / scale).round_().add_(zero_point).clamp_(0, 255)
        rounded = codes.sub_(zero_point).mul_(scale)
    return _straight_through(x, rounded)


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


def _straight_through(
    value: torch.Tensor, rounded: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    if torch.is_grad_enabled() and value.requires_grad:
        through: torch.Tensor = _StraightThrough.apply(value, rounded, mask)  # type: ignore[no-untyped-call]
        return through
    return rounded


def _fake_quantise_weight(
    weight: torch.Tensor, scales: torch.Tensor, format: SiteFormat
) -> torch.Tensor:
    """`weight` `(..., columns)` rounded to its codes and back; gradient clipped to the range."""
    with torch.no_grad():
        rounded = dequantise(quantise(weight, scales, format), scales, format)
        mask = None
        if weight.requires_grad:
            low, high = CODE_RANGE[format.weight_bits]
            steps = expand_scales(scales, weight.shape[-1], group_size(format))
            mask = (weight >= (low - 0.5) * steps) & (weight <= (high + 0.5) * steps)
    return _straight_through(weight, rounded, mask)


def _check(weight: torch.Tensor, scales: torch.Tensor, format: SiteFormat) -> None:
    if format.weight_bits not in CODE_RANGE:
        raise ValueError(f"weight_bits is {format.weight_bits}; a quantised module takes 8 or 4")
    expected = (format.rows, format.columns), (format.rows, group_count(format))
    found = tuple(weight.shape), tuple(scales.shape)
    if found != expected:
        raise ValueError(
            f"weight {found[0]} and scales {found[1]} do not fit the format, which asks for "
            f"weight {expected[0]} and scales {expected[1]}"
        )
    if weight.dtype != torch.float32 or scales.dtype != torch.float32:
        raise ValueError(f"weight {weight.dtype} and scales {scales.dtype} must both be float32")


class _Quantised(nn.Module):
    """What quantised linear layers and tables share: latent weight, scales, cached rounding.

    While no gradient is wanted, the rounded weight is kept until the latent one changes. The cache
    is in no state dictionary and no copy.
    """

    weight: nn.Parameter
    scales: torch.Tensor

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, format: SiteFormat) -> None:
        super().__init__()
        _check(weight, scales, format)
        self.format = format
        self.weight = nn.Parameter(weight.detach())
        self.register_buffer("scales", scales.detach())
        self._rounded: tuple[tuple[int, ...], torch.Tensor] | None = None

    def codes(self) -> torch.Tensor:
        """The integers that are shipped: int8 `(rows, columns)`."""
        with torch.no_grad():
            return quantise(self.weight, self.scales, self.format).to(torch.int8)

    def dequantised(self) -> torch.Tensor:
        """`codes * scale`, float32 `(rows, columns)`, no gradient; do not write to it."""
        key = (
            self.weight.data_ptr(),
            0 if self.weight.is_inference() else self.weight._version,
            self.scales.data_ptr(),
            0 if self.scales.is_inference() else self.scales._version,
        )
        if self._rounded is None or self._rounded[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                rounded = _fake_quantise_weight(self.weight.detach(), self.scales, self.format)
                if torch.equal(rounded, self.weight):
                    rounded = self.weight.detach()  # nothing to round: keep one copy, not two
            self._rounded = (key, rounded)
        return self._rounded[1]

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; forgets the cached rounding."""
        self._rounded = None
        return super().train(mode)

    def _wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and self.weight.requires_grad

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rounded": None}

    def extra_repr(self) -> str:
        """Shape and precision."""
        kind = self.format
        return (
            f"rows={kind.rows}, columns={kind.columns}, weight_bits={kind.weight_bits}, "
            f"group={kind.group}, activation_bits={kind.activation_bits}"
        )


class QuantLinear(_Quantised):
    """A linear layer `(..., columns) → (..., rows)` with quantised weight and, if asked, input.

    Inputs at `activation_bits == 8` are quantised per tensor, asymmetric, at run time
    (`fake_quantise_per_tensor`), whatever the weight's grouping.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scales: torch.Tensor,
        format: SiteFormat,
    ) -> None:
        """Latent `weight` `(rows, columns)`, `bias` `(rows,)`, `scales` `(rows, groups)`; float32.

        The tensors are used as they are, not copied.

        Raises:
            ValueError: if shapes or bits do not fit `format`.
        """
        super().__init__(weight, scales, format)
        if (bias is not None) != format.bias or (
            bias is not None and tuple(bias.shape) != (format.rows,)
        ):
            found = None if bias is None else tuple(bias.shape)
            raise ValueError(f"bias {found} does not fit the format: {format}")
        self.bias = None if bias is None else nn.Parameter(bias.detach())
        self.in_features, self.out_features = format.columns, format.rows

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        format: SiteFormat,
    ) -> QuantLinear:
        """From int8 `codes` `(rows, columns)`; `codes()` gives them back exactly."""
        return cls(dequantise(codes, scales, format), bias, scales, format)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., columns)` → `(..., rows)`."""
        if self.format.activation_bits == 8:
            x = fake_quantise_per_tensor(x)
        if self._wants_gradient():
            weight = _fake_quantise_weight(self.weight, self.scales, self.format)
        else:
            weight = self.dequantised()
        return F.linear(x, weight, self.bias)


class QuantEmbedding(_Quantised):
    """A table `(vocabulary, width)` with quantised rows; only the rows asked for are rounded."""

    def __init__(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor,
        padding_idx: int | None,
        format: SiteFormat,
    ) -> None:
        """Latent `weight` `(rows, columns)`, `scales` `(rows, groups)`; the row `padding_idx` is
        not trained.

        Raises:
            ValueError: if shapes or bits do not fit `format`.
        """
        super().__init__(weight, scales, format)
        self.padding_idx = padding_idx
        self.num_embeddings, self.embedding_dim = format.rows, format.columns

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        padding_idx: int | None,
        format: SiteFormat,
    ) -> QuantEmbedding:
        """From int8 `codes` `(rows, columns)`; `codes()` gives them back exactly."""
        return cls(dequantise(codes, scales, format), scales, padding_idx, format)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Integer `ids` of any shape `(...)` → `(..., width)`."""
        rows = F.embedding(ids, self.weight, self.padding_idx)
        return _fake_quantise_weight(rows, F.embedding(ids, self.scales), self.format)


class Skip(nn.Module):
    """Stands where a sublayer was: whatever comes in, a zero that broadcasts goes out.

    With `outputs > 1` the zero is the first of a tuple whose other entries are `None`, as attention
    modules return `(output, weights)`.
    """

    zero: torch.Tensor

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.outputs = outputs
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        """A zero scalar, or `(zero, None, …)`."""
        if self.outputs == 1:
            return self.zero
        return (self.zero, *[None] * (self.outputs - 1))

    def extra_repr(self) -> str:
        """Number of outputs."""
        return f"outputs={self.outputs}"
