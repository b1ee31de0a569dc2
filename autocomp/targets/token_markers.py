"""Markers of the places in a vision model where tokens can be merged or dropped.

    autocomp::Tokens(x, queries, keys; unit, tokens, …)   (B, T, C), (B, T, H·D) × 2 → (B, T, C)
    autocomp::AveragedTokens(x; protected)                (B, T, C) → (B, T, C)

The first stands between the attention and the feed-forward of every block, the second behind the
final norm of a model whose head takes the mean over patch tokens. `token_nodes.resolve_tokens`
replaces them, by nothing where a candidate leaves the sequence as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from autocomp.core.unit import Unit
from autocomp.models.surgery import model_layout, replace_module
from autocomp.models.tokens import TokenBlock
from autocomp.targets.skeleton_format import DOMAIN


def _symbolic(operator: str, inputs: Sequence[torch.Tensor], **attributes: Any) -> torch.Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{operator}",
        inputs,
        attrs=attributes,
        dtype=torch.float32,
        shape=inputs[0].shape,
        version=1,
    )


class _TokensMarker(nn.Module):
    """Stands for what a candidate may do to the sequence behind an attention unit."""

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        self.unit, self.head_dim = unit.name, unit.head_dim

    def forward(self, x: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return _symbolic(
            "Tokens",
            (x, queries, keys),
            unit=self.unit,
            tokens=int(x.shape[1]),
            width=int(x.shape[2]),
            head_dim=self.head_dim,
        )


class _AveragedMarker(nn.LayerNorm):
    """A norm whose patch tokens the head takes the mean of; keeps its parameters' names."""

    def __init__(self, norm: nn.LayerNorm, protected: int) -> None:
        super().__init__(norm.normalized_shape, eps=norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.protected = protected

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _symbolic("AveragedTokens", (super().forward(input),), protected=self.protected)


def mark_tokens(model: nn.Module, units: Sequence[Unit]) -> None:
    """Put the markers into `model`, in place; nothing where no unit's tokens can be reduced."""
    reducible = [unit for unit in units if unit.protected_tokens is not None]
    if not reducible:
        return
    layout = model_layout(model)
    for unit in reducible:
        assert unit.layer is not None
        path = layout.block_path(unit.layer)
        marker = _TokensMarker(unit)
        block = TokenBlock(model.get_submodule(path), layout.attention, layout.ffn, marker)
        replace_module(model, path, block)
    if layout.averaged is not None:
        path = f"{layout.prefix}.{layout.averaged}"
        norm = model.get_submodule(path)
        assert isinstance(norm, nn.LayerNorm)
        replace_module(model, path, _AveragedMarker(norm, layout.leading_tokens))
