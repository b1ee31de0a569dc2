"""The contract of a mixer, as tests. Needs pytest and torch.

    from autocomp.testing.mixer_contract import MixerContract, seats

    class TestMyMixer(MixerContract):
        @pytest.fixture(params=seats(MyMixer), ids=str)
        def seat(self, request):
            return request.param

A seat is a mixer class in one of the example shapes below; those it refuses are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from autocomp.core.unit import Role
from autocomp.models.mixers.protocol import Mixer, MixerShape

SHAPES = {
    "causal text": MixerShape(hidden=24, heads=4, kv_heads=2, head_dim=8, causal=True),
    "text": MixerShape(hidden=24, heads=3, kv_heads=3, head_dim=8, causal=False),
    "image": MixerShape(hidden=24, heads=2, kv_heads=2, head_dim=8, causal=False, prefix=1),
    "image with registers": MixerShape(24, heads=2, kv_heads=1, head_dim=8, causal=False, prefix=5),
    "image without prefix": MixerShape(24, heads=2, kv_heads=2, head_dim=8, causal=False, prefix=0),
}
"""Name → shape. Text has `TOKENS` tokens, an image `SIDE`² patches."""

TOKENS = 150
SIDE = 9
READ: tuple[Role, ...] = ("query", "key", "value")


@dataclass(frozen=True)
class Seat:
    """A mixer class, and where it is to stand."""

    mixer: type[Mixer]
    place: str

    def __str__(self) -> str:
        return f"{self.mixer.name}-{self.place.replace(' ', '-')}"

    @property
    def shape(self) -> MixerShape:
        """The shape of the sublayer."""
        return SHAPES[self.place]

    def trained(self) -> Mixer:
        """The mixer, with parameters moved away from where they start."""
        mixer = self.mixer(self.shape)
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.1)
        return mixer


@dataclass(frozen=True)
class Inputs:
    """What `forward` reads."""

    x: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    real: Tensor | None = None

    def through(self, mixer: Mixer) -> Tensor:
        """The mixer's output."""
        out: Tensor = mixer(self.x, self.query, self.key, self.value, self.real)
        return out

    def changed(self, change: Mapping[str, Tensor]) -> Inputs:
        """With other tensors."""
        return replace(self, **change)

    def tokens(self, start: int, end: int) -> Inputs:
        """A piece of the sequence."""
        heads = [tensor[:, :, start:end] for tensor in (self.query, self.key, self.value)]
        return Inputs(self.x[:, start:end], *heads)


def seats(*mixers: type[Mixer]) -> list[Seat]:
    """Every seat that these mixers take."""
    every = [Seat(mixer, place) for mixer, place in itertools.product(mixers, SHAPES)]
    return [seat for seat in every if seat.mixer.refuses(seat.shape) is None]


def inputs(
    shape: MixerShape, *, batch: int = 2, tokens: int | None = None, seed: int = 0
) -> Inputs:
    """Normal numbers."""
    if tokens is None:
        tokens = TOKENS if shape.prefix is None else SIDE * SIDE + shape.prefix
    rng = torch.Generator().manual_seed(seed)
    counts = (shape.heads, shape.kv_heads, shape.kv_heads)
    x = torch.randn(batch, tokens, shape.hidden, generator=rng)
    streams = [torch.randn(batch, n, tokens, shape.head_dim, generator=rng) for n in counts]
    return Inputs(x, *streams)


def close(found: Tensor, expected: Tensor) -> None:
    """Equal up to rounding in float32."""
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


class MixerContract:
    """What holds for every mixer, in every shape that it does not refuse."""

    @pytest.fixture
    def seat(self) -> Seat:
        """The mixer under test, and where: parametrise it by `seats`."""
        raise NotImplementedError("give the fixture `seat`, parametrised by seats(MyMixer)")

    def test_it_says_what_it_is(self, seat: Seat) -> None:
        mixer = seat.mixer
        assert mixer.name
        assert mixer.summary.endswith(".")
        assert mixer.paper
        assert mixer.reads
        assert set(mixer.reads) <= set(READ)
        refusals = [mixer.refuses(shape) for shape in SHAPES.values()]
        assert all(reason is None or len(reason) > 10 for reason in refusals)

    def test_output_is_of_the_queries_shape(self, seat: Seat) -> None:
        given = inputs(seat.shape)
        out = given.through(seat.mixer(seat.shape))
        assert out.shape == given.query.shape
        assert out.dtype == given.query.dtype
        assert torch.isfinite(out).all()

    def test_items_of_a_batch_do_not_meet(self, seat: Seat) -> None:
        mixer, given = seat.trained(), inputs(seat.shape)
        alone = Inputs(given.x[:1], given.query[:1], given.key[:1], given.value[:1])
        close(given.through(mixer)[:1], alone.through(mixer))

    def test_construction_is_deterministic(self, seat: Seat) -> None:
        torch.manual_seed(0)
        before = torch.get_rng_state()
        one = seat.mixer(seat.shape).state_dict()
        assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
        torch.manual_seed(1)
        weights = {role: torch.randn(8, 24) for role in (*READ, "output")}
        two = seat.mixer(seat.shape).state_dict()
        assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
        three, four = (seat.mixer.inherit(seat.shape, weights).state_dict() for _ in range(2))
        assert all(torch.equal(four[name], tensor) for name, tensor in three.items())

    def test_parameters_are_all_of_it(self, seat: Seat) -> None:
        trained, given = seat.trained(), inputs(seat.shape)
        loaded = seat.mixer(seat.shape)
        loaded.load_state_dict(trained.state_dict())
        assert torch.equal(given.through(loaded), given.through(trained))

    def test_what_is_not_read_may_be_anything(self, seat: Seat) -> None:
        mixer, given = seat.trained(), inputs(seat.shape)
        batch, tokens = given.x.shape[:2]
        nothing = torch.full((batch, 1, tokens, seat.shape.head_dim), torch.nan)
        unread: dict[str, Tensor] = {role: nothing for role in READ if role not in mixer.reads}
        assert torch.equal(given.changed(unread).through(mixer), given.through(mixer))

    def test_padding_changes_no_real_token(self, seat: Seat) -> None:
        if seat.shape.prefix is not None:
            return  # images have none
        mixer, given, other = seat.trained(), inputs(seat.shape), inputs(seat.shape, seed=1)
        place = torch.arange(TOKENS)
        for kept in (place < TOKENS - 70, place >= 70, place == 60, (place < 20) | (place > 90)):
            real = torch.stack([kept, torch.ones_like(kept)])
            hidden = replace(given, real=real)
            flat, headed = real[..., None], real[:, None, :, None]
            garbage = Inputs(
                torch.where(flat, given.x, 1e3 * other.x),
                torch.where(headed, given.query, 1e3 * other.query),
                torch.where(headed, given.key, 1e3 * other.key),
                torch.where(headed, given.value, 1e3 * other.value),
                real,
            )
            expected, found = hidden.through(mixer), garbage.through(mixer)
            assert torch.isfinite(found[:, :, ~kept]).all()
            close(found.transpose(1, 2)[real], expected.transpose(1, 2)[real])

    def test_padding_at_the_ends_is_as_if_it_were_not(self, seat: Seat) -> None:
        if seat.shape.prefix is not None:
            return  # images have none
        mixer, given = seat.trained(), inputs(seat.shape)
        for start, end in ((0, 83), (67, TOKENS)):
            place = torch.arange(TOKENS)
            real = ((place >= start) & (place < end)).expand(2, -1)
            padded = replace(given, real=real).through(mixer)[:, :, start:end]
            close(padded, given.tokens(start, end).through(mixer))

    def test_the_future_changes_nothing(self, seat: Seat) -> None:
        if not seat.shape.causal:
            return
        mixer, given, other = seat.trained(), inputs(seat.shape), inputs(seat.shape, seed=1)
        expected = given.through(mixer)
        for start in (1, 64, 101):
            future = torch.arange(TOKENS)[:, None] >= start
            mixed = Inputs(
                torch.where(future, other.x, given.x),
                torch.where(future, other.query, given.query),
                torch.where(future, other.key, given.key),
                torch.where(future, other.value, given.value),
            )
            close(mixed.through(mixer)[:, :, :start], expected[:, :, :start])

    def test_pieces_equal_the_whole(self, seat: Seat) -> None:
        if not seat.shape.causal:
            return
        mixer, given = seat.trained(), inputs(seat.shape)
        state = mixer.empty_state(2)
        sizes = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
        for name, tensor in state.items():
            assert tensor.shape[0] == 2, f"{name} is not (B, …)"
            assert tensor.dtype == torch.float32, f"{name}: graphs hold float32"
            assert not tensor.any(), f"{name} is not zero before the first token"
        pieces = []
        for start, end in itertools.pairwise((0, 1, 2, 4, 70, 134, 135, TOKENS)):
            piece = given.tokens(start, end)
            out, state = mixer.extend(piece.x, piece.query, piece.key, piece.value, state)
            assert {name: (t.shape, t.dtype) for name, t in state.items()} == sizes
            pieces.append(out)
        close(torch.cat(pieces, dim=2), given.through(mixer))

    def test_short_texts(self, seat: Seat) -> None:
        if seat.shape.prefix is not None:
            return  # images are of one size
        mixer = seat.trained()
        for tokens in (1, 2, 3, 5):
            given = inputs(seat.shape, tokens=tokens)
            out = given.through(mixer)
            assert out.shape == given.query.shape
            assert torch.isfinite(out).all()

    def test_gradients_reach_everything_it_reads(self, seat: Seat) -> None:
        mixer, given = seat.trained(), inputs(seat.shape)
        read = [getattr(given, role).requires_grad_() for role in mixer.reads]
        out = given.through(mixer)
        rng = torch.Generator().manual_seed(2)
        torch.autograd.backward((out * torch.randn(out.shape, generator=rng)).sum())
        named = [*mixer.named_parameters(), *zip(mixer.reads, read, strict=True)]
        for name, tensor in named:
            assert tensor.grad is not None, f"no gradient reaches {name}"
            assert torch.isfinite(tensor.grad).all(), name
            assert tensor.grad.any(), f"the gradient of {name} is zero"

    def test_calibration_keeps_it_whole(self, seat: Seat) -> None:
        mixer, given = seat.mixer(seat.shape), inputs(seat.shape)
        if seat.shape.prefix is None:
            given = replace(given, real=torch.arange(TOKENS).expand(2, -1) < 100)
        arguments = (given.x, given.query, given.key, given.value, given.real)
        mixer.calibrate(*arguments)
        again = seat.mixer(seat.shape)
        again.calibrate(*arguments)
        assert torch.equal(given.through(mixer), given.through(again))
        assert torch.isfinite(given.through(mixer)).all()

    def test_extremes_stay_finite(self, seat: Seat) -> None:
        given = inputs(seat.shape)
        for scale, shift in ((0.0, 0.0), (1e3, 0.0), (1.0, 30.0), (1.0, -30.0)):
            mixer = seat.trained()
            with torch.no_grad():
                for parameter in mixer.parameters():
                    parameter.add_(shift)
            scaled = Inputs(
                *(
                    (tensor * scale).requires_grad_()
                    for tensor in (given.x, given.query, given.key, given.value)
                )
            )
            out = scaled.through(mixer)
            assert torch.isfinite(out).all(), (scale, shift)
            torch.autograd.backward(out.mean())
            for name, parameter in mixer.named_parameters():
                assert parameter.grad is not None
                assert torch.isfinite(parameter.grad).all(), (name, scale, shift)
            for role in mixer.reads:
                gradient = getattr(scaled, role).grad
                assert torch.isfinite(gradient).all(), (role, scale, shift)
