"""What a mixer is: a module in the place of softmax attention's product.

An attention sublayer keeps its linear layers (those the mixer reads, and the output's), so bits and
sparsity apply to them as before; what lies between them is exchanged. A mixer is one file in this
folder and one entry in `MIXERS`; seating it in a model, distilling it, lowering it to a runtime and
timing it there follow from the protocol.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from autocomp.core.unit import Role

State = dict[str, Tensor]
"""What a causal mixer remembers of the tokens so far: name → `(B, …)`, of constant size."""


@dataclass(frozen=True)
class MixerShape:
    """The attention sublayer a mixer is for.

    Attributes:
        hidden: width C of what the sublayer reads.
        heads, kv_heads, head_dim: H, G and D of its projections.
        causal: whether a token sees earlier ones alone.
        prefix: leading tokens (class token, registers) before the square of patches of an image;
            `None` where tokens are text.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    prefix: int | None = None


class Mixer(nn.Module, ABC):
    """Maps what the projections give to what the output projection reads.

    Class attributes:
        name: as written in a spec.
        summary, paper: for `autocomp ls mixers`.
        version: raised when the parameters it starts from or its training change.
        reads: roles of the projections it uses; the others are dropped from the model.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[Role, ...]] = ("query", "key", "value")

    def __init__(self, shape: MixerShape) -> None:
        super().__init__()
        self.shape = shape

    @classmethod
    def refuses(cls, shape: MixerShape) -> str | None:
        """Why it cannot stand in such a sublayer, or `None`."""
        return None

    @classmethod
    def inherit(cls, shape: MixerShape, weights: Mapping[Role, Tensor]) -> Self:
        """A mixer that starts near the attention with these weights `(rows, columns)`."""
        return cls(shape)

    @abstractmethod
    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None
    ) -> Tensor:
        """`(B, H, T, D)` for whole sequences.

        Args:
            x: `(B, T, C)`, what the projections read.
            query: `(B, H, T, D)`, positions applied where the model applies them to queries; not
                scaled.
            key, value: `(B, G, T, D)`.
            real: bool `(B, T)`, false at padding, which changes no other token's output.
        """

    def calibrate(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None
    ) -> None:
        """Before training: bring output scales to those of softmax attention on these inputs.

        The arguments are those of `forward`. A mixer that ends in a norm starts far off without.
        """

    def empty_state(self, batch: int) -> State:
        """The state before the first token.

        Raises:
            NotImplementedError: for a mixer that cannot decode.
        """
        raise NotImplementedError(f"{self.name} keeps no state")

    def extend(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """The output for `T` more tokens, none of them padding, and the state behind them.

        Over a sequence in pieces it gives what `forward` gives over the whole.
        """
        raise NotImplementedError(f"{self.name} keeps no state")


def repeated(heads: int, tensor: Tensor) -> Tensor:
    """Keys or values `(B, G, T, D)` for every one of `heads` query heads, `(B, H, T, D)`."""
    groups = tensor.shape[1]
    return tensor if groups == heads else tensor.repeat_interleave(heads // groups, dim=1)


def hidden_padding(real: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """The tensors `(B, H, T, D)`, zero where `real` `(B, T)` is false."""
    if real is None:
        return list(tensors)
    kept = real[:, None, :, None]
    return [torch.where(kept, tensor, 0.0) for tensor in tensors]


def split_dim(tensor: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """`tensor` with dimension `dim` as several of these sizes; one of them may be -1."""
    split: Tensor = tensor.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return split
