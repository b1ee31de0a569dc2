"""What each mixer computes, against its definition written out, and where it starts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from autocomp.models.mixers import MIXERS
from autocomp.models.mixers.parts import softmax_attention
from autocomp.models.mixers.protocol import Mixer, MixerShape
from autocomp.models.mixers.retention import Retention
from autocomp.models.mixers.rwkv6 import RWKV6
from autocomp.testing.mixer_contract import SHAPES, Inputs, Seat, inputs


def attention(given: Inputs, allowed: Tensor, heads: int) -> Tensor:
    """Softmax attention where `allowed`, in float64."""
    query, key, value = (t.double() for t in (given.query, given.key, given.value))
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    out: Tensor = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value
    return out


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("place", ["causal text", "text"])
@pytest.mark.parametrize("tokens", [3, 64, 150])
def test_a_window_is_softmax_under_a_band_with_sinks(place: str, tokens: int) -> None:
    mixer = MIXERS.get("window")(SHAPES[place])
    given = inputs(mixer.shape, tokens=tokens)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    first = torch.arange(tokens) < 4
    if mixer.shape.causal:
        allowed = (distance >= 0) & ((distance < 64) | first)
    else:
        allowed = (distance.abs() <= 32) | first
    same(given.through(mixer), attention(given, allowed, mixer.shape.heads))


@pytest.mark.parametrize("side", [4, 8, 9, 14])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_windows_of_an_image(side: int, prefix: int) -> None:
    shape = MixerShape(24, heads=2, kv_heads=1, head_dim=8, causal=False, prefix=prefix)
    given = inputs(shape, tokens=side * side + prefix)
    size = {4: 4, 8: 8, 9: 5, 14: 7}[side]
    row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
    window = row // size * side + column // size
    allowed = torch.ones(side * side + prefix, side * side + prefix, dtype=torch.bool)
    allowed[prefix:, prefix:] = window[:, None] == window
    same(given.through(MIXERS.get("window2d")(shape)), attention(given, allowed, 2))


def test_patches_must_be_a_square() -> None:
    given = inputs(SHAPES["image"], tokens=12)
    for name in ("window2d", "convolution", "pooling"):
        with pytest.raises(ValueError, match="11 patches are no square"):
            given.through(MIXERS.get(name)(SHAPES["image"]))


@pytest.mark.parametrize("name", ["elu", "hedgehog"])
@pytest.mark.parametrize("place", ["causal text", "text"])
def test_linear_attention_is_a_weighted_mean(name: str, place: str) -> None:
    seat = Seat(MIXERS.get(name), place)
    mixer, given = seat.trained(), inputs(seat.shape)
    query, key = given.query, given.key
    if name == "elu":
        query, key = (torch.where(t > 0, t + 1, t.exp()) for t in (query, key))
    else:
        query = torch.einsum("bhtd,hde->bhte", query, mixer.query_map)
        key = torch.einsum("bhtd,hde->bhte", key, mixer.key_map)
        query, key = (torch.cat([t.softmax(-1), (-t).softmax(-1)], -1) for t in (query, key))
    repeats = seat.shape.heads // seat.shape.kv_heads
    scores = query @ key.repeat_interleave(repeats, 1).transpose(-1, -2)
    scores = scores.tril() if seat.shape.causal else scores
    weights = scores / scores.sum(-1, keepdim=True)
    assert (weights >= 0).all()
    same(given.through(mixer), weights @ given.value.repeat_interleave(repeats, 1))


def test_the_fourier_transform() -> None:
    mixer = MIXERS.get("fourier")(SHAPES["image"])
    given = inputs(mixer.shape)
    expected = torch.fft.fft2(given.value.double(), norm="ortho").real
    same(given.through(mixer) * 10, expected)


def test_pooling_and_convolution_start_as_means() -> None:
    for place, back, ahead in (("causal text", 6, 0), ("text", 3, 3)):
        given = inputs(SHAPES[place], tokens=20)
        pooled, convolved = (
            given.through(MIXERS.get(name)(SHAPES[place])) for name in ("pooling", "convolution")
        )
        for t in range(20):
            near = given.value[:, -1, max(0, t - back) : t + ahead + 1]
            same(pooled[:, -1, t], near.mean(1))
            same(convolved[:, -1, t], near.sum(1) / 7)
    given = inputs(SHAPES["image"])
    pooled, convolved = (
        given.through(MIXERS.get(name)(SHAPES["image"])) for name in ("pooling", "convolution")
    )
    same(pooled[:, :, 0], given.value.mean(2))
    same(convolved[:, :, 0], given.value.mean(2))
    square = given.value[:, :, 1:].unflatten(2, (9, 9))
    for row, column in ((0, 0), (4, 5), (8, 3)):
        rows, columns = slice(max(0, row - 1), row + 2), slice(max(0, column - 1), column + 2)
        token = 1 + row * 9 + column
        same(pooled[:, :, token], square[:, :, rows, columns].mean((2, 3)))
        rows, columns = slice(max(0, row - 2), row + 3), slice(max(0, column - 2), column + 3)
        same(convolved[:, :, token], square[:, :, rows, columns].sum((2, 3)) / 25)


def test_retention_fades_as_in_its_paper() -> None:
    mixer = Retention(MixerShape(24, heads=8, kv_heads=8, head_dim=4, causal=True))
    given = inputs(mixer.shape, tokens=3)
    decay = mixer.streams(given.x, given.query, given.key, given.value, None).decay
    expected = 1 - torch.linspace(math.log(1 / 32), math.log(1 / 512), 8).exp()
    same(decay.exp().flatten(), expected)


def test_rwkv6_clamps_its_decay() -> None:
    mixer = RWKV6(SHAPES["causal text"])
    given = inputs(mixer.shape, tokens=5)
    with torch.no_grad():
        mixer.decay_up.fill_(1e4)
    decay = mixer.streams(given.x, given.query, given.key, given.value, None).decay
    same(decay.amin(), torch.tensor(-5.0))
    assert decay.amax() <= 0


@pytest.mark.parametrize("name", ["retention", "mamba2", "rwkv6"])
@pytest.mark.parametrize("place", ["causal text", "text"])
def test_calibration_brings_the_output_to_scale(name: str, place: str) -> None:
    """From several times the error of no output at all, to less than that."""
    mixer: Mixer = MIXERS.get(name)(SHAPES[place])
    given = inputs(mixer.shape)
    target = softmax_attention(given.query, given.key, given.value, None, causal=mixer.shape.causal)

    def error() -> float:
        out = given.through(mixer).detach()
        return float((out - target).square().mean() / target.square().mean())

    before = error()
    mixer.calibrate(given.x, given.query, given.key, given.value)
    assert error() < min(1.0, before)


def test_what_is_replaced_is_softmax_attention() -> None:
    given = inputs(SHAPES["causal text"], tokens=9)
    allowed = torch.ones(9, 9, dtype=torch.bool).tril()
    found = softmax_attention(given.query, given.key, given.value, None, causal=True)
    same(found, attention(given, allowed, 4))
    real = torch.arange(9).expand(2, -1) < 6
    found = softmax_attention(given.query, given.key, given.value, real, causal=False)
    same(found[:, :, :6], attention(given, real[:, None, None], 4)[:, :, :6])
    assert torch.isfinite(found).all()


def test_refusals() -> None:
    for name, place in (("window2d", "text"), ("fourier", "text"), ("fourier", "causal text")):
        assert MIXERS.get(name).refuses(SHAPES[place])
