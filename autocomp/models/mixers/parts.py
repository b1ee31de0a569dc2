"""What several mixers are made of: a short convolution, a norm with its scale, a gate.

All start as near to doing nothing as they can, so that a mixer starts at what it inherits; what
must not start at zero comes from a generator of its own, so that construction is deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autocomp.models.mixers.protocol import repeated, split_dim

ONE_SILU = 1.2784645
"""silu(ONE_SILU) = 1."""


def seeded(*shape: int, scale: float) -> nn.Parameter:
    """The same normal numbers at every call."""
    rng = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(*shape, generator=rng) * scale)


class ShortConvolution(nn.Module):
    """A depthwise convolution over tokens; it starts as the identity. Zero outside the sequence.

    Causal: over the `taps` tokens up to each. Otherwise `taps` is odd, and centred on it.
    """

    def __init__(self, heads: int, width: int, *, taps: int, causal: bool) -> None:
        super().__init__()
        self.before = taps - 1 if causal else taps // 2
        self.behind = taps - 1 - self.before
        weight = torch.zeros(taps, heads, 1, width)
        weight[self.before] = 1.0
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        """`(B, H, T, D)` → same; `past` `(B, H, taps - 1, D)` are the tokens in front of it."""
        if past is None:
            x = nn.functional.pad(x, (0, 0, self.before, self.behind))
        else:
            x = torch.cat([past, x], dim=2)
        tokens = x.shape[2] - self.before - self.behind
        out = self.weight[0] * x[:, :, :tokens]
        for tap in range(1, self.weight.shape[0]):
            out = out + self.weight[tap] * x[:, :, tap : tap + tokens]
        return out

    def empty(self, batch: int) -> Tensor:
        """The past of a first token."""
        taps, heads, _, width = self.weight.shape
        return self.weight.new_zeros(batch, heads, taps - 1, width)

    def next(self, x: Tensor, past: Tensor) -> Tensor:
        """The past of what follows `x`."""
        return torch.cat([past, x], dim=2)[:, :, x.shape[2] :]


class HeadNorm(nn.Module):
    """Each head's output at a root mean square of 1, times a learnt scale per channel of a head."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((heads, 1, width), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, T, D)` → same."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale


class Gate(nn.Module):
    """silu of a low-rank map of what the sublayer reads; it starts at 1."""

    def __init__(self, hidden: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        rank = min(32, hidden)
        self.down = seeded(hidden, rank, scale=hidden**-0.5)
        self.up = nn.Parameter(torch.zeros(rank, heads * width))
        self.bias = nn.Parameter(torch.full((heads * width,), ONE_SILU))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` → `(B, H, T, D)`."""
        gate = nn.functional.silu(x @ self.down @ self.up + self.bias)
        return split_dim(gate, -1, (self.heads, -1)).transpose(1, 2)


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, *, causal: bool
) -> Tensor:
    """What is being replaced: `(B, H, T, D)`."""
    heads, tokens = query.shape[1:3]
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
    seen = seen.tril() if causal else seen
    if real is not None:  # padding sees itself, to stay finite
        itself = torch.eye(tokens, dtype=torch.bool, device=query.device)
        seen = seen & (real[:, None, None, :] | itself)
    return nn.functional.scaled_dot_product_attention(
        query, repeated(heads, key), repeated(heads, value), attn_mask=seen
    )
