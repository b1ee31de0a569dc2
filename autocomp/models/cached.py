"""Keys and values as a cache of 8 bits gives them back, in a model that is trained and evaluated.

A model that generates reads what earlier runs left in its cache. Evaluated on whole sequences it
has no cache, so every key and value is rounded before attention: what is computed is what the
exported graph computes, cached or not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CacheRounding(nn.Module):
    """Rounds keys and values `(B, heads, T, D)` to int8 steps of fixed scales, per channel."""

    key_scale: Tensor
    value_scale: Tensor

    def __init__(self, key_scale: Tensor, value_scale: Tensor, head_dim: int) -> None:
        """`key_scale`, `value_scale`: float32 `(heads · head_dim,)`, above zero."""
        super().__init__()
        for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
            by_head = scale.reshape(-1, 1, head_dim)
            self.register_buffer(name, by_head, persistent=False)

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Both rounded; gradients go straight through inside the range."""
        return rounded(key, self.key_scale), rounded(value, self.value_scale)


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """`x` to the nearest of −128…127 steps of `scale`, which broadcasts to it; straight-through."""
    inside = torch.clamp(x, -128 * scale, 127 * scale)
    with torch.no_grad():
        steps = (x / scale).round_().clamp_(-128, 127) * scale
    return inside + (steps - inside.detach())
