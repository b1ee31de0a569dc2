"""A depthwise convolution over tokens: mixing by place alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autocomp.models.mixers.image_tokens import cut_square
from autocomp.models.mixers.parts import ShortConvolution
from autocomp.models.mixers.protocol import (
    Mixer,
    MixerShape,
    State,
    hidden_padding,
    repeated,
    split_dim,
)

TAPS = 7
SIDE = 5


class Convolution(Mixer):
    """Each channel of the values convolved with a kernel of its own, which starts as the mean.

    Inherited: W_V and W_O; queries and keys are dropped. Text: 7 tokens, the last ones if causal.
    Images: 5 × 5 patches, and the prefix reads the mean of all tokens, scaled per channel.
    """

    name = "convolution"
    summary = "A depthwise convolution of the values: 7 tokens, or 5 × 5 patches."
    paper = "Wu et al., 2019, Pay Less Attention, arXiv:1901.10430"
    reads = ("value",)

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        groups, width = shape.kv_heads, shape.head_dim
        if shape.prefix is None:
            self.tokens = ShortConvolution(groups, width, taps=TAPS, causal=shape.causal)
            nn.init.constant_(self.tokens.weight, 1 / TAPS)
        else:
            self.kernel = nn.Parameter(torch.full((groups * width, 1, SIDE, SIDE), SIDE**-2.0))
            if shape.prefix:
                self.everything = nn.Parameter(torch.ones(groups, 1, width))

    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None
    ) -> Tensor:
        """See `Mixer.forward`."""
        (value,) = hidden_padding(real, value)
        out = self.tokens(value) if self.shape.prefix is None else self._square(value)
        return repeated(self.shape.heads, out)

    def _square(self, value: Tensor) -> Tensor:
        prefix, patches = cut_square(self.shape, value)
        image = patches.permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, G·D, side, side)
        mixed = nn.functional.conv2d(
            image, self.kernel, padding=SIDE // 2, groups=self.kernel.shape[0]
        )
        mixed = split_dim(mixed, 1, (self.shape.kv_heads, -1)).flatten(3).transpose(2, 3)
        if not self.shape.prefix:
            return mixed
        mean = value.mean(2, keepdim=True) * self.everything
        return torch.cat([mean.expand(-1, -1, prefix.shape[2], -1), mixed], dim=2)

    def empty_state(self, batch: int) -> State:
        """The last 6 values, `(B, G, 6, D)`."""
        return {"values": self.tokens.empty(batch)}

    def extend(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """See `Mixer.extend`."""
        out = repeated(self.shape.heads, self.tokens(value, state["values"]))
        return out, {"values": self.tokens.next(value, state["values"])}
