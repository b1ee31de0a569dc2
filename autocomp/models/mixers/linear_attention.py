"""Linear attention: softmax(q·k) becomes φ(q)·φ(k), so keys and values sum up to a fixed size."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from autocomp.models.mixers.protocol import Mixer, MixerShape, State, hidden_padding, repeated
from autocomp.models.mixers.recurrence import bidirectional, chunkwise


class LinearAttention(Mixer):
    """φ(q) Σ φ(k) vᵀ / φ(q) Σ φ(k), with φ ≥ 0."""

    features: int
    """Width of φ for one head."""

    @abstractmethod
    def query_features(self, query: Tensor) -> Tensor:
        """`(B, H, T, D)` → `(B, H, T, features)`."""

    @abstractmethod
    def key_features(self, key: Tensor) -> Tensor:
        """`(B, G, T, D)` → `(B, G, T, features)`."""

    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None
    ) -> Tensor:
        """See `Mixer.forward`."""
        if self.shape.causal:
            return self._causal(query, key, value, real, self.empty_state(query.shape[0]))[0]
        return _divided(bidirectional(*self._streams(query, key, value, real)))

    def empty_state(self, batch: int) -> State:
        """The sums of φ(k) vᵀ, and in a last column of φ(k): `(B, H, features, D + 1)`."""
        sums = torch.zeros(batch, self.shape.heads, self.features, self.shape.head_dim + 1)
        return {"sums": sums}

    def extend(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """See `Mixer.extend`."""
        return self._causal(query, key, value, None, state)

    def _causal(
        self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, state: State
    ) -> tuple[Tensor, State]:
        out, sums = chunkwise(*self._streams(query, key, value, real), state=state["sums"])
        return _divided(out), {"sums": sums}

    def _streams(
        self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        value = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
        key, value = hidden_padding(real, self.key_features(key), value)
        heads = self.shape.heads
        return self.query_features(query), repeated(heads, key), repeated(heads, value)


class EluLinearAttention(LinearAttention):
    """φ(x) = elu(x) + 1. Inherited: query, key, value and output; nothing is new."""

    name = "elu"
    summary = "Linear attention with the fixed feature map elu(x) + 1."
    paper = "Katharopoulos et al., 2020, Transformers are RNNs, arXiv:2006.16236"
    version = 2

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        self.features = shape.head_dim

    def query_features(self, query: Tensor) -> Tensor:
        """See `LinearAttention`."""
        return nn.functional.elu(query) + 1.0

    def key_features(self, key: Tensor) -> Tensor:
        """See `LinearAttention`."""
        return nn.functional.elu(key) + 1.0


class HedgehogAttention(LinearAttention):
    """φ(x) = [softmax(Wx), softmax(-Wx)], one W a head for queries, one a head for keys.

    Inherited: query, key, value and output, positions included (LoLCATs, arXiv:2410.10254, section
    3). New: W, which starts as the identity and is what attention transfer trains (learning rate
    1e-2). Scores are not scaled by D^-1/2: W can learn it.
    """

    name = "hedgehog"
    summary = "Linear attention whose feature map, a softmax either way, is learnt per head."
    paper = "Zhang et al., 2024, The Hedgehog & the Porcupine, arXiv:2402.04347"

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        self.features = 2 * shape.head_dim
        identity = torch.eye(shape.head_dim)
        self.query_map = nn.Parameter(identity.repeat(shape.heads, 1, 1))
        self.key_map = nn.Parameter(identity.repeat(shape.kv_heads, 1, 1))

    def query_features(self, query: Tensor) -> Tensor:
        """See `LinearAttention`."""
        return _both_ways(query @ self.query_map)

    def key_features(self, key: Tensor) -> Tensor:
        """See `LinearAttention`."""
        return _both_ways(key @ self.key_map)


def _both_ways(mapped: Tensor) -> Tensor:
    return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], dim=-1)


def _divided(out: Tensor) -> Tensor:
    """By the last column, the sum of the weights."""
    return out[..., :-1] / out[..., -1:].clamp_min(1e-6)
