"""Linear attention: softmax(q·k) becomes φ(q)·φ(k), so keys and values sum up to a fixed size."""

from __future__ import annotations

import torch
from torch import Tensor

from autocomp.models.mixers.protocol import Mixer, State, hidden_padding, repeated


class EluLinearAttention(Mixer):
    """φ(x) = elu(x) + 1, divided by the sum of the weights; no parameters."""

    name = "elu"
    summary = "Linear attention with the fixed feature map elu(x) + 1."
    paper = "Katharopoulos et al., 2020, Transformers are RNNs, arXiv:2006.16236"

    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None
    ) -> Tensor:
        """See `Mixer.forward`."""
        heads = self.shape.heads
        query = torch.nn.functional.elu(query) + 1.0
        key = torch.nn.functional.elu(repeated(heads, key)) + 1.0
        value = repeated(heads, value)
        key, value = hidden_padding(real, key, value)
        if self.shape.causal:
            scores = (query @ key.transpose(-1, -2)).tril()
            return (scores @ value) / scores.sum(-1, keepdim=True).clamp_min(1e-6)
        total = key.transpose(-1, -2) @ value
        weight = query @ key.sum(dim=2)[..., None]
        return (query @ total) / weight.clamp_min(1e-6)

    def empty_state(self, batch: int) -> State:
        """The sums of φ(k) vᵀ `(B, H, D, D)` and of φ(k) `(B, H, D, 1)`."""
        heads, width = self.shape.heads, self.shape.head_dim
        return {
            "products": torch.zeros(batch, heads, width, width),
            "keys": torch.zeros(batch, heads, width, 1),
        }

    def extend(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """See `Mixer.extend`."""
        heads = self.shape.heads
        query = torch.nn.functional.elu(query) + 1.0
        key = torch.nn.functional.elu(repeated(heads, key)) + 1.0
        value = repeated(heads, value)
        scores = (query @ key.transpose(-1, -2)).tril()
        weight = scores.sum(-1, keepdim=True) + query @ state["keys"]
        out = (scores @ value + query @ state["products"]) / weight.clamp_min(1e-6)
        products = state["products"] + key.transpose(-1, -2) @ value
        keys = state["keys"] + key.sum(dim=2)[..., None]
        return out, {"products": products, "keys": keys}
