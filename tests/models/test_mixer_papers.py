"""Retention, Mamba-2 and RWKV-6 as whole modules: their papers' steps, token by token, in float64.

Nothing of the package computes here: convolution, streams, recurrence, norm and gate are written
out from the equations, with the parameters of a mixer that has moved off its start. Where such a
mixer is changed against its paper, its docstring says so, and so does the test.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autocomp.models.mixers import MIXERS
from autocomp.models.mixers.protocol import MixerShape
from autocomp.testing.mixer_contract import Inputs

CAUSAL = MixerShape(hidden=24, heads=4, kv_heads=2, head_dim=8, causal=True)
BOTH_WAYS = MixerShape(hidden=24, heads=4, kv_heads=2, head_dim=8, causal=False)
IMAGE = MixerShape(hidden=24, heads=4, kv_heads=2, head_dim=8, causal=False, prefix=2)
TOKENS = 75
Parameters = dict[str, Tensor]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def taps(stream: Tensor, weight: Tensor, causal: bool) -> Tensor:
    """`(H, T, D)`: out_t = Σ_i w_i x_{t - reach + i}, nothing outside the text."""
    count, tokens = len(weight), stream.shape[1]
    reach = count - 1 if causal else count // 2
    out = torch.zeros_like(stream)
    for t in range(tokens):
        for i in range(count):
            if 0 <= t - reach + i < tokens:
                out[:, t] += weight[i, :, 0] * stream[:, t - reach + i]
    return out


def convolved(p: Parameters, role: str, stream: Tensor, causal: bool, heads: int) -> Tensor:
    """A stream behind its convolution, if it has one, for every query head."""
    name = f"convolutions.{role}.weight"
    out = taps(stream, p[name], causal) if name in p else stream
    return out.repeat_interleave(heads // len(out), 0)


def gate(p: Parameters, x: Tensor, heads: int) -> Tensor:
    flat = silu(x @ p["gate.down"] @ p["gate.up"] + p["gate.bias"])  # (T, H·D)
    return flat.reshape(len(x), heads, -1).transpose(0, 1)


def normed(p: Parameters, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p["norm.scale"]


def both_ways(scan: Callable[..., Tensor], shape: MixerShape, *streams: Tensor) -> Tensor:
    """A scan without own terms, and in encoders one from the other end.

    To and from the prefix of an image nothing fades: pair by pair.
    """
    prefix = shape.prefix or 0
    patches = [stream[:, prefix:] for stream in streams]
    out = scan(*patches)
    if not shape.causal:
        out = out + scan(*(s.flip(1) for s in patches)).flip(1)
    q, k, v = streams[:3]
    out = torch.cat([torch.zeros_like(v[:, :prefix]), out], 1)
    for t in range(v.shape[1]):
        for s in range(v.shape[1]):
            if s != t and min(s, t) < prefix:
                out[:, t] += (q[:, t] * k[:, s]).sum(-1, keepdim=True) * v[:, s]
    return out


def retention(
    p: Parameters, x: Tensor, q: Tensor, k: Tensor, v: Tensor, shape: MixerShape
) -> Tensor:
    """2307.08621, equation 6: S_n = γ S_{n-1} + K_nᵀ V_n, out = Q_n S_n; 8: norm, gate.

    Keys over √D as in section 2.1; γ = 1 - sigmoid(fading).
    """
    heads, _, width = q.shape
    gamma = (1 - 1 / (1 + (-p["fading"]).exp()))[:, None, None]
    k, v = (s.repeat_interleave(heads // len(s), 0) for s in (k, v))

    def scan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, out = torch.zeros(heads, width, width, dtype=q.dtype), torch.zeros_like(q)
        for n in range(q.shape[1]):
            state = gamma * state
            out[:, n] = torch.einsum("hk,hkv->hv", q[:, n], state)
            state = state + torch.einsum("hk,hv->hkv", k[:, n], v[:, n])
        return out

    k = k / width**0.5
    own = (q * k).sum(-1, keepdim=True) * v
    return normed(p, both_ways(scan, shape, q, k, v) + own) * gate(p, x, heads)


def mamba2(p: Parameters, x: Tensor, q: Tensor, k: Tensor, v: Tensor, shape: MixerShape) -> Tensor:
    """2405.21060: h_t = a_t h_{t-1} + B_t x_t, y_t = C_t h_t + D x_t, a_t = exp(-Δ_t).

    C, B and x behind the short convolution; Δ = softplus(w·u + b); then RMSNorm(y · silu(z)). As in
    MOHAWK (2408.10189) B is not scaled by Δ.
    """
    heads, _, width = q.shape
    c, b, value = (
        convolved(p, role, s, shape.causal, heads)
        for role, s in (("query", q), ("key", k), ("value", v))
    )
    b = b / width**0.5
    step = (x @ p["step_weight"] + p["step_bias"]).exp().log1p()  # (T, H)
    a = (-step).exp().transpose(0, 1)[..., None]  # (H, T, 1)

    def scan(c: Tensor, b: Tensor, value: Tensor, a: Tensor) -> Tensor:
        state, out = torch.zeros(heads, width, width, dtype=c.dtype), torch.zeros_like(c)
        for t in range(c.shape[1]):
            state = a[:, t, :, None] * state
            out[:, t] = torch.einsum("hk,hkv->hv", c[:, t], state)
            state = state + torch.einsum("hk,hv->hkv", b[:, t], value[:, t])
        return out

    y = both_ways(scan, shape, c, b, value, a) + (c * b).sum(-1, keepdim=True) * value
    return normed(p, (y + p["skip"] * value) * gate(p, x, heads))


def rwkv6(p: Parameters, x: Tensor, q: Tensor, k: Tensor, v: Tensor, shape: MixerShape) -> Tensor:
    """2404.05892, Finch: w_t = exp(-exp(ω + tanh(x A) B)),

    wkv_t = S_{t-1} + diag(u) k_tᵀ v_t, S_t = diag(w_t) S_{t-1} + k_tᵀ v_t, out = norm(r wkv) ⊙ g.
    As in RADLADS (2505.03005) log w ≥ -5, and keys times 1 - w; the token shift is behind the
    projections.
    """
    heads, _, width = q.shape
    r, k, v = (
        convolved(p, role, s, shape.causal, heads)
        for role, s in (("query", q), ("key", k), ("value", v))
    )
    rate = p["decay_base"] + (x @ p["decay_down"]).tanh() @ p["decay_up"]
    w = (-rate.exp()).clamp_min(-5.0).exp().reshape(-1, heads, width).transpose(0, 1)
    k = k * (1 - w) / width**0.5

    def scan(r: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        state, out = torch.zeros(heads, width, width, dtype=r.dtype), torch.zeros_like(r)
        for t in range(r.shape[1]):
            out[:, t] = torch.einsum("hk,hkv->hv", r[:, t], state)
            state = w[:, t, :, None] * state + torch.einsum("hk,hv->hkv", k[:, t], v[:, t])
        return out

    bonus = (r * p["bonus"][:, None] * k).sum(-1, keepdim=True) * v
    return normed(p, both_ways(scan, shape, r, k, v, w) + bonus) * gate(p, x, heads)


PAPERS = {"retention": retention, "mamba2": mamba2, "rwkv6": rwkv6}


@pytest.mark.parametrize(
    "shape", [CAUSAL, BOTH_WAYS, IMAGE], ids=["causal", "both ways", "image with a prefix"]
)
@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_steps(name: str, shape: MixerShape) -> None:
    rng = torch.Generator().manual_seed(5)
    mixer = MIXERS.get(name)(shape).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
            parameter.add_(0.3 * noise)
    counts = (shape.heads, shape.kv_heads, shape.kv_heads)
    x = torch.randn(2, TOKENS, shape.hidden, generator=rng, dtype=torch.float64)
    streams = [torch.randn(2, n, TOKENS, 8, generator=rng, dtype=torch.float64) for n in counts]
    p = {key: tensor.detach() for key, tensor in mixer.state_dict().items()}
    with torch.no_grad():
        found = Inputs(x, *streams).through(mixer)
    for item in range(2):
        expected = PAPERS[name](p, x[item], *(s[item] for s in streams), shape)
        torch.testing.assert_close(found[item], expected, rtol=1e-9, atol=1e-9)
