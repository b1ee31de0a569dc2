"""Softmax attention to the tokens near by, and to the first ones: linear in T."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from autocomp.models.mixers.protocol import Mixer, State, repeated, split_dim


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
        return self._local(query, key, value, real, sinks)

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
            "seen": torch.zeros(batch, dtype=torch.int64),
        }

    def extend(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """See `Mixer.extend`."""
        tokens, past = query.shape[2], self.window - 1
        seen = state["seen"][:, None]
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
            position - seen + past,
            position < seen + tokens,
        )
        # in the numbering of `keys` and `values`, the first tokens of which may not have been
        real = torch.arange(past + tokens, device=x.device) >= past - seen
        keys, values = repeated(heads, keys), repeated(heads, values)
        if tokens == 1:
            return self._one(query, keys, values, real, sinks), behind
        queries = pad(query, (0, 0, past, 0))
        return self._local(queries, keys, values, real, sinks)[:, :, past:], behind

    def _local(
        self, query: Tensor, key: Tensor, value: Tensor, real: Tensor, sinks: Sinks
    ) -> Tensor:
        """In chunks, each with the one in front of it and, for encoders, the one behind."""
        tokens = query.shape[2]
        causal = self.shape.causal
        chunk = self.window if causal else self.window // 2
        chunks = (tokens + chunk - 1) // chunk  # of positive numbers: ONNX divides towards zero
        missing = chunks * chunk - tokens
        query, key, value = (
            split_dim(pad(tensor, (0, 0, 0, missing)), 2, (chunks, chunk))
            for tensor in (query, key, value)
        )
        cut = split_dim(pad(real, (0, missing)), 1, (chunks, chunk))[:, None, ..., None]
        near = _with_neighbours(cut, causal)[..., 0]  # (B, 1, N, 2 or 3 chunks)
        near_key, near_value = (_with_neighbours(tensor, causal) for tensor in (key, value))

        offset = torch.arange(chunk, device=query.device)
        other = torch.arange(near.shape[-1], device=query.device)
        inside = self._inside(offset[:, None] + chunk - other)
        allowed = inside & near[:, :, :, None]
        position = torch.arange(chunks, device=query.device)[:, None] * chunk + offset
        far = self._behind(position[..., None] - sinks.position[:, None, None])
        allowed_sinks = (far & sinks.there[:, None, None])[:, None]  # (B, 1, N, L, S)

        scores = torch.cat(
            [
                _masked(query @ near_key.transpose(-1, -2), allowed),
                _masked(query @ sinks.key[:, :, None].transpose(-1, -2), allowed_sinks),
            ],
            dim=-1,
        )
        weights = self._softmax(scores)
        out = weights[..., : -self.sinks] @ near_value
        out = out + weights[..., -self.sinks :] @ sinks.value[:, :, None]
        return out.flatten(2, 3)[:, :, :tokens]

    def _one(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor, sinks: Sinks) -> Tensor:
        """The last token alone: all of `key` is inside its window."""
        far = self._behind(key.shape[2] - 1 - sinks.position) & sinks.there
        allowed = torch.cat([real, far], dim=1)[:, None, None]
        scores = query @ torch.cat([key, sinks.key], dim=2).transpose(-1, -2)
        weights = self._softmax(_masked(scores, allowed))
        return weights @ torch.cat([value, sinks.value], dim=2)

    def _softmax(self, scores: Tensor) -> Tensor:
        scale = 1 / math.sqrt(self.shape.head_dim)
        return (scores * scale).softmax(-1)

    def _inside(self, distance: Tensor) -> Tensor:
        """Whether a token at so many tokens before the reader is in its window."""
        if self.shape.causal:
            return (distance >= 0) & (distance < self.window)
        return distance.abs() <= self.window // 2

    def _behind(self, distance: Tensor) -> Tensor:
        """Whether a sink so far before the reader is seen, and not in its window anyway."""
        if self.shape.causal:
            return distance >= self.window
        return distance.abs() > self.window // 2


def _masked(scores: Tensor, allowed: Tensor) -> Tensor:
    """Finite also where nothing is allowed: such rows are padding."""
    return torch.where(allowed, scores, -1e30)


def _taken(tensor: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` `(B, S)` of `(B, H, T, D)`."""
    _, heads, _, width = tensor.shape
    return tensor.gather(2, index[:, None, :, None].expand(-1, heads, -1, width))


def _with_neighbours(chunks: Tensor, causal: bool) -> Tensor:
    """`(B, H, N, L, D)` → `(B, H, N, 2 or 3 L, D)`: zero or false outside the sequence."""
    around = [pad(chunks, (0, 0, 0, 0, 1, 0))[:, :, :-1], chunks]
    if not causal:
        around.append(pad(chunks, (0, 0, 0, 0, 0, 1))[:, :, 1:])
    return torch.cat(around, dim=3)
