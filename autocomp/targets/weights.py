"""What lowering needs to know of a site: its format and arrays. Providers for models and formats.

A *provider* maps a site's name to its `SiteWeights`, or to `None` when the site is skipped.
`model_weights` reads a stitched torch model; `stand_in_weights` makes up arrays from formats
alone: the latency of a graph does not depend on the values in it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.core.unit import SiteFormat

if TYPE_CHECKING:
    from torch import nn

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class SiteWeights:
    """Arrays of one site.

    Attributes:
        format: what they are.
        weight: float32 `(rows, columns)` when dense, else `None`.
        codes: int8 `(rows, columns)` when quantised.
        scales: float32 `(rows, groups)` when quantised.
        bias: float32 `(rows,)` or `None`.
        input_scale: float32 `(columns,)` where the format is scaled, else `None`.
        input_range: smallest and largest input where the format is static, else `None`.
        mask: bool `(rows, columns)` when sparse, true at the weights that are stored.
        output_scale: float32 `(rows,)` where outputs are cached in 8 bits, else `None`.
    """

    format: SiteFormat
    weight: Array | None = None
    codes: Array | None = None
    scales: Array | None = None
    bias: Array | None = None
    input_scale: Array | None = None
    input_range: tuple[float, float] | None = None
    mask: Array | None = None
    output_scale: Array | None = None

    def dequantised(self) -> Array:
        """float32 `(rows, columns)`: what the codes stand for."""
        if self.weight is not None:
            return self.weight
        assert self.codes is not None
        assert self.scales is not None
        group = self.format.group or self.format.columns
        scales = np.repeat(self.scales, group, axis=1)[:, : self.format.columns]
        product: Array = self.codes.astype(np.float32) * scales
        return product

    def live_scales(self) -> Array:
        """float32 `(rows, groups)`: scales, those of groups of zeros as large as their row's.

        What such a group's scale is makes no difference to its weights (the grid says 1), but it
        must not stand for the row's largest where others are stored in proportion to that. 1 in a
        row of zeros.
        """
        assert self.codes is not None
        assert self.scales is not None
        groups = self.scales.shape[1]
        width = self.format.group or self.format.columns
        missing = groups * width - self.format.columns
        codes = np.pad(self.codes, ((0, 0), (0, missing))).reshape(len(self.codes), groups, width)
        live = (codes != 0).any(axis=2) & (self.scales > 0)
        largest = np.where(live, self.scales, 0).max(axis=1, keepdims=True)
        largest = np.where(largest > 0, largest, 1)
        scales: Array = np.where(live, self.scales, largest).astype(np.float32)
        return scales


Provider = Callable[[str], SiteWeights | None]


def model_weights(model: nn.Module) -> Provider:
    """The sites of a torch model, dense or stitched; a site that is not there is skipped.

    Quantised modules are recognised by what they offer: `format`, `codes()` and `scales`; sparse
    ones by a `mask`.
    """

    def provide(site: str) -> SiteWeights | None:
        try:
            module: Any = model.get_submodule(site)
        except AttributeError:
            return None
        if hasattr(module, "row_of"):
            module = module.table  # a pruned vocabulary: the artifact takes its own ids
        if not hasattr(module, "weight"):
            return None
        bias = getattr(module, "bias", None)
        bias = None if bias is None else _array(bias)
        rows, columns = module.weight.shape
        mask = getattr(module, "mask", None)
        mask = None if mask is None else _array(mask)
        scale = getattr(module, "output_scale", None)
        scale = None if scale is None else _array(scale)
        if not hasattr(module, "codes"):
            embedding = hasattr(module, "num_embeddings")
            dense = SiteFormat(rows, columns, bias is not None, embedding=embedding)
            left = dense if mask is None else module.format
            left = left if scale is None else replace(left, cache_bits=8)
            return SiteWeights(
                left, weight=_array(module.weight), bias=bias, mask=mask, output_scale=scale
            )
        scales = _array(module.scales).reshape(rows, -1)
        input_scale = getattr(module, "input_scale", None)
        return SiteWeights(
            module.format,
            codes=_array(module.codes()),
            scales=scales,
            bias=bias,
            input_scale=None if input_scale is None else _array(input_scale),
            input_range=getattr(module, "input_range", None),
            mask=mask,
            output_scale=scale,
        )

    return provide


def model_parameters(model: nn.Module) -> Mapping[str, Array]:
    """Every parameter and buffer by name, as arrays that share the model's memory."""
    return {name: _array(tensor) for name, tensor in model.state_dict().items()}


def _array(tensor: Any) -> Array:
    array: Array = tensor.detach().cpu().numpy()
    return array


def stand_in_weights(formats: Mapping[str, SiteFormat], seed: int = 0) -> Provider:
    """Made-up arrays in these formats; a site without a format is skipped."""
    rng = np.random.default_rng(seed)
    noise = (rng.standard_normal(1 << 16) * 0.03).astype(np.float32)
    codes = {8: rng.integers(-127, 128, 1 << 16, dtype=np.int8)}
    for bits in (4, 3, 2):
        half = 1 << (bits - 1)
        codes[bits] = rng.integers(-half, half, 1 << 16, dtype=np.int8)

    def provide(site: str) -> SiteWeights | None:
        spec = formats.get(site)
        if spec is None:
            return None
        shape = (spec.rows, spec.columns)
        own = zlib.crc32(site.encode()) % len(noise)  # a runtime may store equal arrays once
        bias = np.zeros(spec.rows, np.float32) if spec.bias else None
        scale = None if spec.cache_bits == 32 else np.full(spec.rows, 0.03, np.float32)
        mask: Array | None = None
        if spec.nonzeros is not None:
            flat = np.zeros(spec.rows * spec.columns, np.bool_)
            flat[np.linspace(0, flat.size - 1, spec.nonzeros).astype(np.int64)] = True
            mask = flat.reshape(shape)
        if spec.weight_bits == 32:
            weight = np.resize(np.roll(noise, own), shape)
            weight = weight if mask is None else weight * mask
            return SiteWeights(spec, weight=weight, bias=bias, mask=mask, output_scale=scale)
        groups = -(-spec.columns // (spec.group or spec.columns))
        scales = np.full((spec.rows, groups), 0.06 / 2 ** (spec.weight_bits - 1), np.float32)
        made_up = np.resize(np.roll(codes[spec.weight_bits], own), shape)
        return SiteWeights(
            spec,
            codes=made_up if mask is None else made_up * mask,
            scales=scales,
            bias=bias,
            mask=mask,
            input_scale=np.full(spec.columns, 0.5, np.float32) if spec.scaled else None,
            input_range=(-4.0, 4.0) if spec.static else None,
            output_scale=scale,
        )

    return provide
