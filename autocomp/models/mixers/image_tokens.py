"""Tokens of an image as a square of patches behind a prefix (class token, registers)."""

from __future__ import annotations

import math

from torch import Tensor

from autocomp.models.mixers.protocol import MixerShape, split_dim

NO_IMAGE = "it mixes a square of patches, and this model reads text"


def cut_square(shape: MixerShape, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`(B, H, T, D)` → the prefix `(B, H, P, D)` and the patches `(B, H, side, side, D)`.

    Raises:
        ValueError: where the patches are no square: some were dropped or merged.
    """
    assert shape.prefix is not None
    count = tokens.shape[2] - shape.prefix
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(
            f"{count} patches are no square. Mixers over a square of patches need all of an "
            "image's patches: search them in layers in front of those that reduce tokens"
        )
    prefix, patches = tokens[:, :, : shape.prefix], tokens[:, :, shape.prefix :]
    return prefix, split_dim(patches, 2, (side, side))
