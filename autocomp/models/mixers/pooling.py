"""The mean of the tokens near by: mixing that reads nothing and costs next to nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autocomp.models.mixers.image_tokens import cut_square
from autocomp.models.mixers.protocol import (
    Mixer,
    MixerShape,
    State,
    hidden_padding,
    repeated,
    split_dim,
)

REACH = 3
"""Text: so many tokens to each side; twice as many back if causal."""
SIDE = 3


class Pooling(Mixer):
    """near · mean of the values near by + own · a token's own value, per channel.

    Inherited: W_V and W_O; queries and keys are dropped. `near` starts at 1 and `own` at 0 (the
    paper subtracts a token's own, which training may do). Text: 7 tokens. Images: 3 × 3 patches,
    and the prefix reads the mean of all tokens. Neither padding nor what is outside counts.
    """

    name = "pooling"
    summary = "The mean of the values of 7 tokens, or of 3 × 3 patches, scaled per channel."
    paper = "Yu et al., 2022, MetaFormer is actually what you need, arXiv:2111.11418"
    reads = ("value",)

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        self.near = nn.Parameter(torch.ones(shape.kv_heads, 1, shape.head_dim))
        self.own = nn.Parameter(torch.zeros(shape.kv_heads, 1, shape.head_dim))

    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None
    ) -> Tensor:
        """See `Mixer.forward`."""
        if self.shape.prefix is not None:
            return self._scaled(self._square(value), value)
        counted, value = hidden_padding(real, torch.ones_like(value[..., :1]), value)
        around = (2 * REACH, 0) if self.shape.causal else (REACH, REACH)
        sums, counts = (
            _sums(nn.functional.pad(tensor, (0, 0, *around))) for tensor in (value, counted)
        )
        return self._scaled(sums / counts.clamp_min(1.0), value)

    def empty_state(self, batch: int) -> State:
        """The last 6 values, and in a last column whether they are any, `(B, G, 6, D + 1)`."""
        return {
            "values": torch.zeros(batch, self.shape.kv_heads, 2 * REACH, self.shape.head_dim + 1)
        }

    def extend(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """See `Mixer.extend`."""
        counted = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
        values = torch.cat([state["values"], counted], dim=2)
        sums = _sums(values)
        out = self._scaled(sums[..., :-1] / sums[..., -1:], value)
        return out, {"values": values[:, :, value.shape[2] :]}

    def _square(self, value: Tensor) -> Tensor:
        prefix, patches = cut_square(self.shape, value)
        image = patches.permute(0, 1, 4, 2, 3).flatten(0, 1)  # (B·G, D, side, side)
        mean = nn.functional.avg_pool2d(
            image, SIDE, stride=1, padding=SIDE // 2, count_include_pad=False
        )
        near = split_dim(mean.flatten(2).transpose(1, 2), 0, (-1, self.shape.kv_heads))
        everything = value.mean(2, keepdim=True).expand(-1, -1, prefix.shape[2], -1)
        return torch.cat([everything, near], dim=2)

    def _scaled(self, mean: Tensor, value: Tensor) -> Tensor:
        return repeated(self.shape.heads, self.near * mean + self.own * value)


def _sums(tokens: Tensor) -> Tensor:
    """Sums of 2·REACH + 1 tokens that follow one another: `2·REACH` fewer than `tokens`."""
    count = tokens.shape[2] - 2 * REACH
    total = tokens[:, :, :count]
    for shift in range(1, 2 * REACH + 1):
        total = total + tokens[:, :, shift : shift + count]
    return total
