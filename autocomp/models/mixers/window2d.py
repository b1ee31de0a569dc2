"""Softmax attention within windows of an image, and between all tokens and its prefix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from autocomp.models.mixers.image_tokens import NO_IMAGE, cut_square
from autocomp.models.mixers.protocol import Mixer, MixerShape, repeated, split_dim

SIDE = 8
"""The longest side of a window, in patches."""


class Window2d(Mixer):
    """Swin's windows, unshifted: patches see their window and the prefix, the prefix sees all.

    Inherited: everything, scores and positions included; nothing is new. The prefix carries what
    windows have to tell each other. The square is cut into windows as even as may be, at most
    8 × 8.
    """

    name = "window2d"
    summary = "Softmax attention within windows of 8 × 8 patches, and to and from the class token."
    paper = "Liu et al., 2021, Swin Transformer, arXiv:2103.14030"

    @classmethod
    def refuses(cls, shape: MixerShape) -> str | None:
        """See `Mixer.refuses`."""
        return NO_IMAGE if shape.prefix is None else None

    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None
    ) -> Tensor:
        """See `Mixer.forward`; images have no padding."""
        heads = self.shape.heads
        query = query * self.shape.head_dim**-0.5
        key, value = repeated(heads, key), repeated(heads, value)
        first_query, square = cut_square(self.shape, query)
        first_key, key_square = cut_square(self.shape, key)
        first_value, value_square = cut_square(self.shape, value)
        first = _softmax(first_query @ key.transpose(-1, -2)) @ value

        side = square.shape[2]
        count = -(-side // SIDE)
        size = -(-side // count)
        edge = count * size - side
        windows, keys, values = (
            _windows(pad(tensor, (0, 0, 0, edge, 0, edge)), count)
            for tensor in (square, key_square, value_square)
        )
        there = pad(torch.ones(1, 1, side, side, 1, device=x.device), (0, 0, 0, edge, 0, edge))
        seen = _windows(there, count).transpose(-1, -2) > 0  # (1, 1, windows, 1, patches)
        scores = torch.where(seen, windows @ keys.transpose(-1, -2), -1e30)
        to_first = windows @ first_key[:, :, None].transpose(-1, -2)
        weights = _softmax(torch.cat([to_first, scores], dim=-1))
        prefix = first_key.shape[2]
        out = weights[..., :prefix] @ first_value[:, :, None] + weights[..., prefix:] @ values
        out = split_dim(split_dim(out, 3, (size, size)), 2, (count, count))
        out = out.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :side, :side]
        return torch.cat([first, out.flatten(2, 3)], dim=2)


def _windows(square: Tensor, count: int) -> Tensor:
    """`(B, H, side, side, D)` → `(B, H, windows, patches of a window, D)`."""
    rows = split_dim(split_dim(square, 3, (count, -1)), 2, (count, -1)).transpose(3, 4)
    return rows.flatten(4, 5).flatten(2, 3)


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)
