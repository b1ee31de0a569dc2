"""Softmax attention to the tokens near by, and to the first ones: linear in T."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from autocomp.models.mixers.protocol import Mixer, State, repeated, split_dim
from autocomp.models.mixers.recurrence import shorter


class Sinks(NamedTuple):
    """The first tokens, which every later one sees."""

    key: Tensor
    """`(B, H, S, D)`."""
    value: Tensor
    """`(B, H, S, D)`."""
    position: Tensor
    """`(B, S)`, in the numbering of the queries."""
    there: Tensor
    """bool `(B, S)`: false where the sequence is shorter."""


class SlidingWindow(Mixer):
    """Softmax over a window, and over `sinks` first tokens, whose weight is not to be missed.

    Inherited: everything, scores and positions included; nothing is new, and on sequences no longer
    than the window nothing changes. Causal: the last `window` tokens. Encoders: `window // 2` to
    each side (Longformer, arXiv:2004.05150).
    """

    name = "window"
    summary = "Softmax attention within a sliding window of 64 tokens, and to the first 4."
    paper = "Xiao et al., 2023, Efficient Streaming Language Models, arXiv:2309.17453"
    window = 64
    sinks = 4

    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None
    ) -> Tensor:
        """See `Mixer.forward`."""
        batch, tokens = x.shape[:2]
        heads = self.shape.heads
        key, value = repeated(heads, key), repeated(heads, value)
        position = torch.arange(self.sinks, device=x.device).expand(batch, -1)
        if real is None:
            real = torch.ones(batch, tokens, dtype=torch.bool, device=x.device)
        else:
            position = position + real.to(torch.int32).argmax(1, keepdim=True)
        index = position.clamp_max(tokens - 1)
        there = real.gather(1, index) & (position < tokens)
        sinks = Sinks(_taken(key, index), _taken(value, index), position, there)
        before, behind = self._reach()
        key, value = (pad(tensor, (0, 0, before, behind)) for tensor in (key, value))
        return self._near(query, key, value, pad(real, (before, behind)), sinks)

    def empty_state(self, batch: int) -> State:
        """The last `window - 1` keys and values, the first `sinks`, and how many tokens so far."""
        groups, width = self.shape.kv_heads, self.shape.head_dim
        last = torch.zeros(batch, groups, self.window - 1, width)
        first = torch.zeros(batch, groups, self.sinks, width)
        return {
            "keys": last,
            "values": last.clone(),
            "sink_keys": first,
            "sink_values": first.clone(),
            "seen": torch.zeros(batch),
        }

    def extend(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """See `Mixer.extend`."""
        tokens, past = query.shape[2], self.window - 1
        seen = state["seen"].to(torch.int64)[:, None]
        position = torch.arange(self.sinks, device=x.device).expand(x.shape[0], -1)
        new = (position - seen).clamp(0, tokens - 1)
        known = (position < seen)[:, None, :, None]
        sink_key = torch.where(known, state["sink_keys"], _taken(key, new))
        sink_value = torch.where(known, state["sink_values"], _taken(value, new))
        keys = torch.cat([state["keys"], key], dim=2)
        values = torch.cat([state["values"], value], dim=2)
        behind = {
            "keys": keys[:, :, tokens:],
            "values": values[:, :, tokens:],
            "sink_keys": sink_key,
            "sink_values": sink_value,
            "seen": state["seen"] + tokens,
        }
        heads = self.shape.heads
        sinks = Sinks(
            repeated(heads, sink_key),
            repeated(heads, sink_value),
            position - seen,
            position < seen + tokens,
        )
        # the first tokens in `keys` and `values` may not have been
        real = torch.arange(past + tokens, device=x.device) >= past - seen
        keys, values = repeated(heads, keys), repeated(heads, values)
        return self._near(query, keys, values, real, sinks), behind

    def _reach(self) -> tuple[int, int]:
        """Tokens that a window holds in front of the reader and behind it."""
        half = self.window // 2
        return (self.window - 1, 0) if self.shape.causal else (half, half)

    def _near(
        self, query: Tensor, key: Tensor, value: Tensor, real: Tensor, sinks: Sinks
    ) -> Tensor:
        """In chunks. Keys, values and `real` have `_reach()` more tokens in front and behind."""
        tokens = query.shape[2]
        chunk = shorter(tokens, self.window)
        chunks = (tokens + chunk - 1) // chunk  # of positive numbers: ONNX divides towards zero
        missing = chunks * chunk - tokens
        before, behind = self._reach()
        width = before + chunk + behind
        offset = torch.arange(chunk, device=query.device)
        other = torch.arange(width, device=query.device)
        start = torch.arange(chunks, device=query.device)[:, None] * chunk
        index = (start + other).flatten()
        query = split_dim(pad(query, (0, 0, 0, missing)), 2, (chunks, chunk))
        key, value = (
            split_dim(pad(tensor, (0, 0, 0, missing)).index_select(2, index), 2, (chunks, width))
            for tensor in (key, value)
        )
        there = split_dim(pad(real, (0, missing)).index_select(1, index), 1, (chunks, width))
        distance = offset[:, None] + before - other  # (chunk, width)
        inside = (distance <= before) & (distance >= -behind)
        allowed = inside & there[:, None, :, None]  # (B, 1, N, chunk, width)
        far = (start + offset)[..., None] - sinks.position[:, None, None]
        far = (far > before) | (far < -behind) if behind else far > before
        allowed_sinks = (far & sinks.there[:, None, None])[:, None]  # (B, 1, N, chunk, S)

        scores = torch.cat(
            [
                _masked(query @ key.transpose(-1, -2), allowed),
                _masked(query @ sinks.key[:, :, None].transpose(-1, -2), allowed_sinks),
            ],
            dim=-1,
        )
        weights = (scores * (1 / math.sqrt(self.shape.head_dim))).softmax(-1)
        out = weights[..., : -self.sinks] @ value
        out = out + weights[..., -self.sinks :] @ sinks.value[:, :, None]
        return out.flatten(2, 3)[:, :, :tokens]


def _masked(scores: Tensor, allowed: Tensor) -> Tensor:
    """Finite also where nothing is allowed: such rows are padding."""
    return torch.where(allowed, scores, -1e30)


def _taken(tensor: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` `(B, S)` of `(B, H, T, D)`."""
    _, heads, _, width = tensor.shape
    return tensor.gather(2, index[:, None, :, None].expand(-1, heads, -1, width))
