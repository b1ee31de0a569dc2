"""The Fourier transform in the place of attention: all tokens meet, by place alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from autocomp.models.mixers.protocol import Mixer, MixerShape, repeated


class Fourier(Mixer):
    """The real part of the transform over tokens and over a head's channels, scaled per channel.

    Inherited: W_V and W_O; queries and keys are dropped. The transform keeps the values' energy but
    has nothing of the attention's output, so the scale starts small. The paper's transform is over
    the whole width; here W_O mixes the heads. It needs a fixed number of tokens and none of them
    padding, so it is for images alone. Written as products with two constant matrices.
    """

    name = "fourier"
    summary = "FNet: the Fourier transform over an image's tokens; no queries, no keys."
    paper = "Lee-Thorp et al., 2021, FNet, arXiv:2105.03824"
    reads = ("value",)

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        self.scale = nn.Parameter(torch.full((shape.kv_heads, 1, shape.head_dim), 0.1))

    @classmethod
    def refuses(cls, shape: MixerShape) -> str | None:
        """See `Mixer.refuses`."""
        if shape.causal:
            return "the Fourier transform lets a token read what comes after it"
        if shape.prefix is None:
            return "the Fourier transform needs a fixed number of tokens, and texts vary in length"
        return None

    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None
    ) -> Tensor:
        """See `Mixer.forward`; images have no padding."""
        token_cos, token_sin = _transform(value, value.shape[2])
        width_cos, width_sin = _transform(value, value.shape[3])
        mixed = token_cos @ (value @ width_cos) - token_sin @ (value @ width_sin)
        return repeated(self.shape.heads, mixed * self.scale)


def _transform(like: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Real and negated imaginary part of the unitary transform, `(size, size)` each."""
    index = torch.arange(size, device=like.device)
    angle = (index[:, None] * index % size).to(like.dtype) * (2 * math.pi / size)
    return angle.cos() * size**-0.5, angle.sin() * size**-0.5
