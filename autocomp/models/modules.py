"""The modules a compressed model is made of: quantised linear layers and tables, skipped sublayers.

Weights are symmetric: `codes = clamp(round(weight / scale))` with −127…127 at 8 bits, −8…7 at 4,
−4…3 at 3 and −2…1 at 2; one scale per row, or per `group` consecutive columns of a row (the last
group may be shorter). The float `weight` stays trainable: the forward pass rounds it, the backward
pass goes straight through (Bengio et al., 2013, arXiv:1308.3432), clipped outside the range.
Activations are quantised as the runtime does it, so that what is evaluated here is what is shipped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from autocomp.core.activation_grid import float32, static_grid
from autocomp.core.unit import SiteFormat
from autocomp.models.codes import (
    CODE_RANGE,
    fake_quantise_weight,
    group_count,
    quantise,
)
from autocomp.models.rounding import (
    Integers,
    fake_quantise_per_tensor,
    fake_quantise_static,
    integer_linear,
    integer_products,
)
from autocomp.models.sparse import check_mask


def _check(weight: torch.Tensor, scales: torch.Tensor, format: SiteFormat) -> None:
    if format.weight_bits not in CODE_RANGE:
        raise ValueError(
            f"weight_bits is {format.weight_bits}; a quantised module takes "
            f"{', '.join(map(str, CODE_RANGE))}"
        )
    expected = (format.rows, format.columns), (format.rows, group_count(format))
    found = tuple(weight.shape), tuple(scales.shape)
    if found != expected:
        raise ValueError(
            f"weight {found[0]} and scales {found[1]} do not fit the format, which asks for "
            f"weight {expected[0]} and scales {expected[1]}"
        )
    if weight.dtype != torch.float32 or scales.dtype != torch.float32:
        raise ValueError(f"weight {weight.dtype} and scales {scales.dtype} must both be float32")


def _check_inputs(
    format: SiteFormat,
    input_scale: torch.Tensor | None,
    input_range: tuple[float, float] | None,
) -> None:
    if format.static and format.activation_bits != 8:
        raise ValueError(f"a static range needs 8-bit activations: {format}")
    if (input_range is not None) != format.static or (input_scale is not None) != format.scaled:
        raise ValueError(
            f"input_range {input_range} and input_scale "
            f"{None if input_scale is None else 'given'} do not fit the format: {format}"
        )
    if input_range is not None:
        static_grid(*input_range)
        if any(float32(end) != end for end in input_range):
            raise ValueError(f"input_range {input_range} must be of float32 values")
    if input_scale is not None and (
        tuple(input_scale.shape) != (format.columns,) or input_scale.dtype != torch.float32
    ):
        raise ValueError(
            f"input_scale {input_scale.dtype} {tuple(input_scale.shape)} must be float32 "
            f"({format.columns},)"
        )


@dataclass(frozen=True)
class _Rounded:
    """A weight's rounding, and what it was made from: as long as that is held, its address is not
    given to another tensor."""

    key: tuple[int, ...]
    source: tuple[torch.Tensor, torch.Tensor]
    weight: torch.Tensor
    codes: torch.Tensor | None = None
    integers: Integers | None = None


class _Quantised(nn.Module):
    """What quantised linear layers and tables share: latent weight, scales, cached rounding.

    While no gradient is wanted, the rounded weight is kept until the latent one changes. The cache
    is in no state dictionary and no copy.
    """

    weight: nn.Parameter
    scales: torch.Tensor
    mask: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor,
        format: SiteFormat,
        codes: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        _check(weight, scales, format)
        check_mask(weight, mask, format)
        self.format = format
        self.weight = nn.Parameter(weight.detach())
        self.register_buffer("scales", scales.detach())
        self.register_buffer("mask", mask)
        self._rounded: _Rounded | None = None
        if codes is not None:
            if codes.shape != weight.shape or codes.dtype != torch.int8:
                raise ValueError(
                    f"codes {codes.dtype} {tuple(codes.shape)} must be int8 {tuple(weight.shape)}"
                )
            self._keep(self.weight.detach(), codes)

    def codes(self) -> torch.Tensor:
        """The integers that are shipped: int8 `(rows, columns)`."""
        with torch.no_grad():
            return quantise(self.weight, self.scales, self.format).to(torch.int8)

    def dequantised(self) -> torch.Tensor:
        """`codes * scale`, float32 `(rows, columns)`, no gradient; do not write to it."""
        return self._current().weight

    def integers(self) -> Integers:
        """What integer products are made of; cached. Grouped scales are brought to one per row."""
        current = self._current()
        if current.integers is None:
            with torch.inference_mode(False), torch.no_grad():
                integers = self._integers(current)
            current = replace(current, integers=integers)
            self._rounded = current
        assert current.integers is not None
        return current.integers

    def _integers(self, current: _Rounded) -> Integers:
        if self.scales.shape[1] == 1:
            codes, scales = current.codes, self.scales[:, 0]
            if codes is None:
                codes = self.codes()
        else:
            low, high = torch.aminmax(current.weight, dim=1)
            scales = torch.maximum(-low, high) / 127.0
            scales = torch.where(scales > 0, scales, 1.0)
            codes = (current.weight / scales[:, None]).round_().to(torch.int8)
        return Integers(codes, codes.sum(dim=1, dtype=torch.int32).to(torch.float32), scales)

    def _current(self) -> _Rounded:
        """The cached rounding, made anew if weight or scales are not what it was made from."""
        if self._rounded is not None and self._rounded.key == self._key():
            return self._rounded
        with torch.inference_mode(False), torch.no_grad():
            rounded = fake_quantise_weight(self.weight.detach(), self.scales, self.format)
            if torch.equal(rounded, self.weight):
                rounded = self.weight.detach()  # nothing to round: keep one copy, not two
        return self._keep(rounded)

    def _keep(self, weight: torch.Tensor, codes: torch.Tensor | None = None) -> _Rounded:
        source = (self.weight.detach(), self.scales)
        self._rounded = _Rounded(self._key(), source, weight, codes)
        return self._rounded

    def _key(self) -> tuple[int, ...]:
        return (
            self.weight.data_ptr(),
            0 if self.weight.is_inference() else self.weight._version,
            self.scales.data_ptr(),
            0 if self.scales.is_inference() else self.scales._version,
        )

    def _trains(self) -> bool:
        """Whether a gradient is wanted of this pass. If so the cached rounding is forgotten: fused
        optimisers write to weights whose version stays."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return False
        self._rounded = None
        return True

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

    Inputs are first multiplied by `input_scale` `(columns,)` where the format is `scaled`. At
    `activation_bits == 8` they are then quantised per tensor, asymmetric, whatever the weight's
    grouping: to their range at run time (`fake_quantise_per_tensor`), or where the format is
    `static` to `input_range` (`fake_quantise_static`); neither is trained. Without gradients, and
    where the CPU is fast at it, such a layer multiplies integers as the runtime does: a weight with
    grouped scales is widened to 8 bits with a scale per row.
    """

    bias: nn.Parameter | None
    input_scale: torch.Tensor | None
    range_ends: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scales: torch.Tensor,
        format: SiteFormat,
        codes: torch.Tensor | None = None,
        *,
        input_scale: torch.Tensor | None = None,
        input_range: tuple[float, float] | None = None,
        mask: torch.Tensor | None = None,
    ) -> None:
        """Latent `weight` `(rows, columns)`, `bias` `(rows,)`, `scales` `(rows, groups)`; float32.

        The tensors are used as they are, not copied. With `codes`, int8 `(rows, columns)`, the
        weight is taken to be exactly `codes * scale`: nothing is rounded until it changes. A sparse
        layer has a bool `mask` `(rows, columns)`: a weight that is zero where it is false is not
        trained.

        Raises:
            ValueError: if shapes or bits do not fit `format`.
        """
        super().__init__(weight, scales, format, codes, mask)
        if (bias is not None) != format.bias or (
            bias is not None and tuple(bias.shape) != (format.rows,)
        ):
            found = None if bias is None else tuple(bias.shape)
            raise ValueError(f"bias {found} does not fit the format: {format}")
        _check_inputs(format, input_scale, input_range)
        self.bias = None if bias is None else nn.Parameter(bias.detach())
        self.register_buffer("input_scale", input_scale)
        ends = None if input_range is None else torch.tensor(input_range, dtype=torch.float32)
        self.register_buffer("range_ends", ends)
        self.in_features, self.out_features = format.columns, format.rows

    @property
    def input_range(self) -> tuple[float, float] | None:
        """Smallest and largest input of static activations."""
        if self.range_ends is None:
            return None
        low, high = self.range_ends.tolist()
        return low, high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., columns)` → `(..., rows)`."""
        if self.input_scale is not None:
            x = x * self.input_scale
        ends = self.input_range
        grid = None if ends is None else static_grid(*ends)
        if self._in_integers(x):
            return integer_linear(x, self.integers(), self.bias, grid)
        if grid is not None:
            x = fake_quantise_static(x, *grid)
        elif self.format.activation_bits == 8:
            x = fake_quantise_per_tensor(x)
        if self._trains():
            weight = fake_quantise_weight(self.weight, self.scales, self.format, self.mask)
        else:
            weight = self.dequantised()
        return F.linear(x, weight, self.bias)

    def _in_integers(self, x: torch.Tensor) -> bool:
        """Whether this call can run as the runtime does it, on the codes themselves."""
        return (
            not torch.is_grad_enabled()
            and self.format.activation_bits == 8
            and x.dtype == torch.float32
            and x.device.type == "cpu"
            and integer_products()
        )


class QuantEmbedding(_Quantised):
    """A table `(vocabulary, width)` with quantised rows; only the rows asked for are rounded."""

    def __init__(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor,
        padding_idx: int | None,
        format: SiteFormat,
        codes: torch.Tensor | None = None,
    ) -> None:
        """Latent `weight` `(rows, columns)`, `scales` `(rows, groups)`; the row `padding_idx` is
        not trained. `codes` as for `QuantLinear`.

        Raises:
            ValueError: if shapes or bits do not fit `format`.
        """
        super().__init__(weight, scales, format, codes)
        self.padding_idx = padding_idx
        self.num_embeddings, self.embedding_dim = format.rows, format.columns

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Integer `ids` of any shape `(...)` → `(..., width)`."""
        self._trains()
        rows = F.embedding(ids, self.weight, self.padding_idx)
        return fake_quantise_weight(rows, F.embedding(ids, self.scales), self.format)


class Unread(nn.Module):
    """In the place of a projection no mixer reads: one head of zeros."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, T, C)` → `(B, T, D)`."""
        return x.new_zeros(()).expand(*x.shape[:-1], self.head_dim)


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
