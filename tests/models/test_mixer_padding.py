"""Padding anywhere, in any mixer: no real token's output depends on what stands there."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocomp.models.mixers import MIXERS
from autocomp.testing.mixer_contract import Inputs, Seat, inputs, seats

TEXTS = [
    seat
    for seat in seats(*(MIXERS.get(name) for name in MIXERS.names()))
    if seat.shape.prefix is None
]


@given(
    seat=st.sampled_from(TEXTS),
    tokens=st.integers(1, 140),
    share=st.sampled_from([0.02, 0.3, 0.7, 0.98]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_random_masks(seat: Seat, tokens: int, share: float, seed: int) -> None:
    """Holes, texts of nothing but padding, a single real token: large numbers stay out."""
    mixer = seat.trained()
    read, other = (inputs(seat.shape, tokens=tokens, seed=seed + i) for i in (0, 1))
    rng = torch.Generator().manual_seed(seed)
    real = torch.rand(2, tokens, generator=rng) < share
    flat, headed = real[..., None], real[:, None, :, None]
    garbage = Inputs(
        torch.where(flat, read.x, 1e3 * other.x),
        torch.where(headed, read.query, 1e3 * other.query),
        torch.where(headed, read.key, 1e3 * other.key),
        torch.where(headed, read.value, 1e3 * other.value),
        real,
    )
    with torch.no_grad():
        expected, found = replace(read, real=real).through(mixer), garbage.through(mixer)
    assert torch.isfinite(found).all()
    kept = found.transpose(1, 2)[real], expected.transpose(1, 2)[real]
    torch.testing.assert_close(*kept, rtol=2e-4, atol=2e-5)


def test_every_mixer_of_texts_is_drawn_from() -> None:
    ours = {name for name in MIXERS if MIXERS.get(name).__module__.startswith("autocomp.")}
    assert {seat.mixer.name for seat in TEXTS} == ours - {"fourier", "window2d"}
