"""Checkpoints that store linear layers turned and fused (GPT-2): plain ones inside autocomp.

transformers builds such a layer as a `Conv1D` with weight `(columns, rows)`, and query, key and
value as one. On load they become `nn.Linear`, one per site, so that every other room knows linear
layers only; on save they become what they were, so that a teacher's directory is an ordinary
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from autocomp.models.surgery import (
    blocks,
    copy_for_surgery,
    dense_linear,
    model_layout,
    replace_module,
)


class Outputs(tuple[torch.Tensor, ...]):
    """The outputs of several layers where the caller expects one tensor and splits it.

    It may be split in the places it came from only, which need not be of equal size.
    """

    __slots__ = ()

    def split(self, size: int, dim: int = -1) -> tuple[torch.Tensor, ...]:
        """The outputs as they are; `size` is what it was before heads were removed."""
        return self


class Projections(nn.Module):
    """Linear layers that read one input, in place of a layer that computed all of them at once."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> Outputs:
        """`(B, T, columns)` → the layers' `(B, T, rows)` in order."""
        return Outputs(part(x) for part in self.children())


def to_linear(model: nn.Module) -> None:
    """Replace a loaded model's `Conv1D` layers by linear ones, fused ones by `Projections`.

    Nothing happens where the layout has none, or it was done before.
    """
    layout = model_layout(model)
    for block in blocks(model):
        for path in layout.transposed:
            layer: Any = block.get_submodule(path)
            if not isinstance(layer, Conv1D):
                continue
            weight, bias = layer.weight.detach().t(), layer.bias.detach()
            names = layout.fused.get(path)
            if names is None:
                replace_module(block, path, dense_linear(weight.contiguous(), bias))
                continue
            weights, biases = weight.chunk(len(names)), bias.chunk(len(names))
            parts: dict[str, nn.Module] = {
                name: dense_linear(one.contiguous(), other.clone())
                for name, one, other in zip(names, weights, biases, strict=True)
            }
            replace_module(block, path, Projections(parts))


def as_transformers(model: nn.Module) -> nn.Module:
    """The dense model with transformers' own modules: what can be saved and loaded elsewhere.

    A copy that shares what need not be turned, or `model` itself where nothing need be.

    Raises:
        ValueError: if a layer that must be turned is no dense one of its original shape.
    """
    layout = model_layout(model)
    if not layout.transposed:
        return model
    native = copy_for_surgery(model)
    for layer, block in enumerate(blocks(native)):
        for path in layout.transposed:
            place = f"{layout.block_path(layer)}.{path}"
            try:
                module = block.get_submodule(path)
            except AttributeError as error:
                raise ValueError(f"{place} was skipped: only a dense model can be saved") from error
            parts = module.children() if isinstance(module, Projections) else (module,)
            if not isinstance(module, Conv1D):
                replace_module(block, path, _conv(parts, place))
    return native


def _conv(parts: Iterable[nn.Module], path: str) -> nn.Module:
    weights, biases = [], []
    for linear in parts:
        if type(linear) is not nn.Linear:
            raise ValueError(f"{path} is {type(linear).__name__}: only a dense model can be saved")
        weights.append(linear.weight.detach())
        biases.append(linear.bias.detach())
    weight = torch.cat(weights)
    build: Any = Conv1D
    conv: nn.Module = build(*weight.shape)
    conv.weight = nn.Parameter(weight.t().contiguous())
    conv.bias = nn.Parameter(torch.cat(biases))
    return conv


def save_model(model: nn.Module, path: Path) -> None:
    """Write a dense model as transformers would: config.json and safetensors."""
    native: Any = as_transformers(model)
    native.save_pretrained(path)
