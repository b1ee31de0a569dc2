"""The gated recurrence: three equal forms, the papers' own recurrences, gradients, extremes."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from autocomp.models.mixers.recurrence import bidirectional, chunkwise, quadratic, recurrent

KINDS = ("none", "constant", "scalar", "vector", "constant vector")
DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5}


class Case(NamedTuple):
    streams: list[Tensor]
    decay: Tensor | None
    state: Tensor
    diagonal: float | Tensor

    def to(self, dtype: torch.dtype) -> Case:
        streams = [tensor.to(dtype) for tensor in self.streams]
        decay = None if self.decay is None else self.decay.to(dtype)
        diagonal = self.diagonal
        if isinstance(diagonal, Tensor):
            diagonal = diagonal.to(dtype)
        return Case(streams, decay, self.state.to(dtype), diagonal)


def case(
    kind: str,
    tokens: int,
    *,
    seed: int = 0,
    heads: int = 2,
    width: int = 4,
    diagonal: str = "1",
    strength: float = 0.3,
    batch: int = 2,
) -> Case:
    """Random streams in float64."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    streams = [normal(batch, heads, tokens, size) for size in (width, width, width + 1)]
    shapes = {
        "constant": (1, heads, 1, 1),
        "scalar": (batch, heads, tokens, 1),
        "vector": (batch, heads, tokens, width),
        "constant vector": (1, heads, 1, width),
    }
    decay = None if kind == "none" else -strength * normal(*shapes[kind]).exp()
    own = normal(heads, width) if diagonal == "u" else float(diagonal)
    return Case(streams, decay, normal(batch, heads, width, width + 1), own)


def assert_same(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest value: sums without decay grow with T."""
    scale = max(1.0, float(expected.abs().max()))
    assert float((found.double() - expected.double()).abs().max()) <= tolerance * scale


@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 150),
    heads=st.integers(1, 3),
    width=st.integers(1, 9),
    chunk=st.sampled_from([1, 3, 5, 8, 16, 32, 64]),
    read_before=st.booleans(),
    diagonal=st.sampled_from(["1", "0", "u"]),
    strength=st.sampled_from([0.01, 0.3, 2.0]),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 2**16),
)
@example("vector", 150, 2, 8, 64, True, "u", 0.3, torch.float64, 0)
@example("scalar", 129, 2, 8, 64, False, "1", 0.3, torch.float64, 0)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_three_forms_agree(
    kind: str,
    tokens: int,
    heads: int,
    width: int,
    chunk: int,
    read_before: bool,
    diagonal: str,
    strength: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    sizes: dict[str, int] = {"heads": heads, "width": width}
    exact = case(kind, tokens, seed=seed, diagonal=diagonal, strength=strength, **sizes)
    reference = recurrent(
        *exact.streams, exact.decay, read_before=read_before, diagonal=exact.diagonal
    )
    streams, decay, state, own = exact.to(dtype)
    rules = {"read_before": read_before, "diagonal": own}
    tolerance = DTYPES[dtype]
    assert_same(quadratic(*streams, decay, **rules), reference[0], tolerance)
    for found, expected in zip(
        chunkwise(*streams, decay, chunk=chunk, **rules), reference, strict=True
    ):
        assert_same(found, expected, tolerance)
    # from a state that is not zero
    continued = recurrent(*streams, decay, state=state, **rules)
    for found, expected in zip(
        chunkwise(*streams, decay, state=state, chunk=chunk, **rules), continued, strict=True
    ):
        assert_same(found, expected, tolerance)


@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 40),
    chunk=st.sampled_from([1, 5, 16, 64]),
    read_before=st.booleans(),
    diagonal=st.sampled_from(["1", "0", "u"]),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 2**16),
)
@example("vector", 131, 64, True, "u", torch.float64, 0)
@example("scalar", 131, 64, False, "1", torch.float64, 0)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_both_directions(
    kind: str,
    tokens: int,
    chunk: int,
    read_before: bool,
    diagonal: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Against every pair, written out: a pair meets through what lies between, and once."""
    exact = case(kind, tokens, seed=seed, diagonal=diagonal, batch=1, heads=1)
    query, key, value = (tensor[0, 0] for tensor in exact.streams)
    width = query.shape[-1]
    decay = torch.zeros(tokens, width, dtype=torch.float64)
    if exact.decay is not None:
        decay = (
            exact.decay[0, 0]
            .expand(tokens, width)
            .clamp_min(-5.0 if "vector" in kind else -torch.inf)
        )
    own = exact.diagonal[0] if isinstance(exact.diagonal, Tensor) else exact.diagonal
    expected = torch.zeros_like(value)
    for t, s in itertools.product(range(tokens), range(tokens)):
        low, high = (s + 1, t + 1) if s < t else (t, s)
        if read_before:  # the reader's own step is not taken
            low, high = min(s, t) + 1, max(s, t)
        weight = decay[low:high].sum(0).exp() if s != t else own
        expected[t] += (query[t] * weight * key[s]).sum() * value[s]
    streams, back, _, own = exact.to(dtype)
    rules = {"read_before": read_before, "diagonal": own}
    for found in (
        bidirectional(*streams, back, chunk=chunk, **rules),
        quadratic(*streams, back, bidirectional=True, **rules),
    ):
        assert_same(found[0, 0], expected, DTYPES[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_equal_the_whole(kind: str) -> None:
    whole = case(kind, 23)
    expected, last = chunkwise(*whole.streams, whole.decay, chunk=4)
    read, state = [], None
    for start, end in itertools.pairwise((0, 1, 9, 22, 23)):
        decay = whole.decay
        if decay is not None and decay.shape[2] > 1:
            decay = decay[:, :, start:end]
        piece = [tensor[:, :, start:end] for tensor in whole.streams]
        out, state = chunkwise(*piece, decay, state=state, chunk=4)
        read.append(out)
    torch.testing.assert_close(torch.cat(read, 2), expected)
    torch.testing.assert_close(state, last)


def test_retention_of_its_paper() -> None:
    """RetNet (2307.08621), equations 5 and 6: S_n = γ S_{n-1} + K_nᵀ V_n, (QKᵀ ⊙ D) V."""
    (query, key, value), *_ = case("none", 37, heads=3)
    gamma = 1 - torch.exp2(-5.0 - torch.arange(3, dtype=torch.float64))
    distance = torch.arange(37)[:, None] - torch.arange(37)
    mask = torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp_min(0), 0.0)
    parallel = (query @ key.transpose(-1, -2) * mask) @ value
    state = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    for n in range(37):
        state = gamma[:, None, None] * state + key[:, :, n, :, None] * value[:, :, n, None]
        torch.testing.assert_close((query[:, :, n, None] @ state)[:, :, 0], parallel[:, :, n])
    out, last = chunkwise(query, key, value, gamma.log()[None, :, None, None], chunk=8)
    torch.testing.assert_close(out, parallel, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last, state, rtol=1e-10, atol=1e-10)


def test_rwkv6_of_its_paper() -> None:
    """Eagle and Finch (2404.05892), eq. 19: wkv_t = diag(u) k_tᵀ v_t + S, S = diag(w) S + kᵀv."""
    (receptance, key, value), decay, _, bonus = case("vector", 37, diagonal="u")
    assert decay is not None
    decay = decay.clamp_min(-5.0)
    state = torch.zeros(2, 2, 4, 5, dtype=torch.float64)
    expected = []
    for t in range(37):
        outer = key[:, :, t, :, None] * value[:, :, t, None]
        wkv = bonus[:, :, None] * outer + state
        expected.append((receptance[:, :, t, None] @ wkv)[:, :, 0])
        state = decay[:, :, t, :, None].exp() * state + outer
    out, last = chunkwise(receptance, key, value, decay, read_before=True, diagonal=bonus, chunk=32)
    torch.testing.assert_close(out, torch.stack(expected, 2), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last, state, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_mamba2_of_transformers() -> None:
    """The whole layer of transformers, with our recurrence in the middle of it."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=16, num_heads=4, head_dim=8, state_size=6, n_groups=2, chunk_size=4, expand=2
    )
    layer = Mamba2Mixer(config, layer_idx=0).eval()
    with torch.no_grad():
        layer.dt_bias.normal_()
        layer.D.normal_()
        layer.norm.weight.normal_()
        x = torch.randn(2, 11, 16)
        expected = layer(x)

        gate, mixed, step = layer.in_proj(x).split([32, 32 + 2 * 2 * 6, 4], dim=-1)
        mixed = layer.act(layer.conv1d(mixed.transpose(1, 2))[..., :11].transpose(1, 2))
        v, k, q = mixed.split([32, 12, 12], dim=-1)
        v, k, q = (
            tensor.unflatten(-1, (-1, width)).transpose(1, 2)
            for tensor, width in ((v, 8), (k, 6), (q, 6))
        )
        step = torch.nn.functional.softplus(step + layer.dt_bias).transpose(1, 2)[..., None]
        decay = -layer.A_log.exp()[:, None, None] * step
        k, q = (tensor.repeat_interleave(2, dim=1) for tensor in (k, q))
        out, _ = chunkwise(q, k * step, v, decay, chunk=4)
        out = (out + layer.D[:, None, None] * v).transpose(1, 2).flatten(2)
        found = layer.out_proj(layer.norm(out, gate))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read_before", [False, True])
def test_gradients(kind: str, read_before: bool) -> None:
    small = case(kind, 5, heads=1, width=2, batch=1, diagonal="u")
    inputs = [*small.streams, small.state, small.diagonal]
    if small.decay is not None:
        inputs.append(small.decay)
    for tensor in inputs:
        assert isinstance(tensor, Tensor)
        tensor.requires_grad_()

    def run(q: Tensor, k: Tensor, v: Tensor, state: Tensor, own: Tensor, *decay: Tensor) -> object:
        return chunkwise(
            q, k, v, *decay, state=state, diagonal=own, read_before=read_before, chunk=4
        )

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.0, 4.9, 80.0, 1e4])
@pytest.mark.parametrize("form", [chunkwise, bidirectional])
def test_extreme_decays(kind: str, strength: float, form: object) -> None:
    """Full chunks of the strongest decay: neither the values nor the gradients are lost."""
    streams, decay, _, _ = case(kind, 130, batch=1).to(torch.float32)
    if decay is not None:
        decay = torch.full_like(decay, -strength).requires_grad_()
    for tensor in streams:
        tensor.requires_grad_()
    out = form(*streams, decay)  # type: ignore[operator]
    out = out if isinstance(out, Tensor) else out[0]
    out.sum().backward()
    exact = [tensor.detach().double() for tensor in streams]
    expected = quadratic(
        *exact,
        None if decay is None else decay.detach().double(),
        bidirectional=form is bidirectional,
    )
    assert_same(out.detach(), expected, 1e-5)
    for tensor in [*streams, *([] if decay is None else [decay])]:
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
