"""What retention, Mamba-2 and RWKV-6 share: the recurrence, with a convolution in front of it.

Such a mixer says what goes into the recurrence (`streams`) and what becomes of what comes out of it
(`finished`); running it over sequences, both ways, and piece by piece follows.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autocomp.models.mixers.parts import Gate, HeadNorm, ShortConvolution, softmax_attention
from autocomp.models.mixers.protocol import Mixer, MixerShape, State, hidden_padding
from autocomp.models.mixers.recurrence import Diagonal, bidirectional, chunkwise

READ = ("query", "key", "value")


class Streams(NamedTuple):
    """What the recurrence reads: `(B, H, T, D)` each, `decay` as it says; zero at padding."""

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor


class RecurrentMixer(Mixer):
    """A recurrence whose output goes through a gate, starting at 1, and a norm with a scale.

    The scale is what `calibrate` brings to that of softmax attention: without it such a mixer
    starts at two to three times the error of leaving the sublayer's output zero.

    Patches of an image are a sequence, row by row. Its prefix (class token, registers) has no place
    in it: what it writes and what it reads does not fade. Counted as tokens in front of the first
    patch, it would all but miss the last rows.
    """

    read_before = False

    def __init__(self, shape: MixerShape, *, taps: int) -> None:
        """`taps`: of the convolution over queries, keys and values; 1 for none."""
        super().__init__(shape)
        counts = zip(READ, (shape.heads, shape.kv_heads, shape.kv_heads), strict=True)
        self.convolutions = nn.ModuleDict(
            {
                role: ShortConvolution(count, shape.head_dim, taps=taps, causal=shape.causal)
                for role, count in counts
                if taps > 1
            }
        )
        self.gate = Gate(shape.hidden, shape.heads, shape.head_dim)
        self.norm = HeadNorm(shape.heads, shape.head_dim)

    @abstractmethod
    def streams(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None
    ) -> Streams:
        """What the recurrence reads, from convolved queries, keys and values."""

    def diagonal(self) -> Diagonal:
        """The weight of a token's own term."""
        return 1.0

    def finished(self, x: Tensor, out: Tensor, value: Tensor) -> Tensor:
        """The output, from what was read `(B, H, T, D)` and the value stream."""
        gated: Tensor = self.norm(out) * self.gate(x)
        return gated

    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None
    ) -> Tensor:
        """See `Mixer.forward`."""
        if self.shape.causal:
            start = self.empty_state(x.shape[0])
            return self._causal(x, (query, key, value), real, start)[0]
        query, key, value = hidden_padding(real, query, key, value)
        if self.convolutions:
            query = self.convolutions["query"](query)
            key = self.convolutions["key"](key)
            value = self.convolutions["value"](value)
        streams = self.streams(x, query, key, value, real)
        return self.finished(x, self._both_ways(streams), streams.value)

    @torch.no_grad()
    def calibrate(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None
    ) -> None:
        """See `Mixer.calibrate`: least squares per head, over the real tokens."""
        target = softmax_attention(query, key, value, real, causal=self.shape.causal)
        (out,) = hidden_padding(real, self(x, query, key, value, real))
        dims = (0, 2, 3)
        factor = (out * target).sum(dims) / out.square().sum(dims).clamp_min(1e-12)
        self.norm.scale.mul_(factor[:, None, None])

    def empty_state(self, batch: int) -> State:
        """S `(B, H, D, D)`, and what the convolutions look back on, `(B, H or G, taps - 1, D)`."""
        width = self.shape.head_dim
        past = {role: self._convolution(role).empty(batch) for role in self.convolutions}
        return {"state": torch.zeros(batch, self.shape.heads, width, width), **past}

    def extend(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """See `Mixer.extend`."""
        return self._causal(x, (query, key, value), None, state)

    def _causal(
        self, x: Tensor, read: tuple[Tensor, Tensor, Tensor], real: Tensor | None, state: State
    ) -> tuple[Tensor, State]:
        mixed, behind = hidden_padding(real, *read), {}
        for index, role in enumerate(READ if self.convolutions else ()):
            convolution, stream = self._convolution(role), mixed[index]
            mixed[index] = convolution(stream, state[role])
            behind[role] = convolution.next(stream, state[role])
        query, key, value = mixed
        streams = self.streams(x, query, key, value, real)
        out, last = chunkwise(
            *streams,
            state=state["state"],
            read_before=self.read_before,
            diagonal=self.diagonal(),
        )
        return self.finished(x, out, streams.value), {"state": last, **behind}

    def _both_ways(self, streams: Streams) -> Tensor:
        own, prefix = self.diagonal(), self.shape.prefix or 0
        query, key, value, decay = streams
        if not prefix:
            return bidirectional(*streams, read_before=self.read_before, diagonal=own)
        first = [tensor[:, :, :prefix] for tensor in (query, key, value)]
        query, key, value = (tensor[:, :, prefix:] for tensor in (query, key, value))
        if decay.shape[2] > 1:
            decay = decay[:, :, prefix:]
        out = bidirectional(
            query, key, value, decay, read_before=self.read_before, diagonal=own
        ) + query @ (first[1].transpose(-1, -2) @ first[2])
        ahead = bidirectional(*first, diagonal=own) + first[0] @ (key.transpose(-1, -2) @ value)
        return torch.cat([ahead, out], dim=2)

    def _convolution(self, role: str) -> ShortConvolution:
        convolution = self.convolutions[role]
        assert isinstance(convolution, ShortConvolution)
        return convolution
