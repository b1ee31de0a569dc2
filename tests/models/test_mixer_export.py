"""Every mixer exports to ONNX, batch and tokens open, and says there what it says in torch.

An export takes seconds: two stand for the rest, which are marked slow (`pytest -m slow`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from autocomp.models.mixers import MIXERS
from autocomp.models.mixers.protocol import Mixer
from autocomp.testing.mixer_contract import Seat, inputs, seats

NAMES = ("x", "query", "key", "value")
OPEN = torch.export.Dim.DYNAMIC
EXAMPLE = 150
"""Tokens of the example: with a single chunk torch takes their number for fixed."""


def each(found: list[Seat], *, quick: str) -> list[object]:
    return [
        pytest.param(seat, id=str(seat), marks=[] if str(seat) == quick else pytest.mark.slow)
        for seat in found
    ]


EVERY = seats(*(MIXERS.get(name) for name in MIXERS.names()))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """torch traces every step of an export into a log, and pytest would keep it."""
    trace = logging.getLogger("torch.__trace")
    trace.disabled = True
    yield
    trace.disabled = False


class Whole(nn.Module):
    """`Mixer.forward`."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        return (self.mixer(*given),)


class Extended(Whole):
    """`Mixer.extend`: the state goes in behind the inputs, and comes out behind the output."""

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        names = list(self.mixer.empty_state(1))
        state = dict(zip(names, given[4:], strict=True))
        out, behind = self.mixer.extend(*given[:4], state)
        return (out, *(behind[name] for name in names))


def streams(seat: Seat, batch: int, tokens: int | None) -> list[Tensor]:
    given = inputs(seat.shape, batch=batch, tokens=tokens, seed=tokens or 0)
    return [given.x, given.query, given.key, given.value]


def exported(
    module: Whole, given: list[Tensor], tokens: bool, path: Path
) -> onnxruntime.InferenceSession:
    """`tokens`: whether their number stays open."""
    axes = [{0: OPEN, 1: OPEN}, *[{0: OPEN, 2: OPEN}] * 3] if tokens else [{0: OPEN}] * 4
    rest = [{0: OPEN, 1: OPEN} if t.dtype == torch.bool else {0: OPEN} for t in given[4:]]
    torch.onnx.export(
        module.eval(),
        tuple(given),
        path,
        dynamo=True,
        opset_version=20,
        input_names=[str(index) for index in range(len(given))],
        dynamic_shapes=((*axes, *rest),),
        verbose=False,
    )
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@torch.no_grad()
def assert_same(session: onnxruntime.InferenceSession, module: Whole, given: list[Tensor]) -> None:
    fed = {node.name: given[int(node.name)].numpy() for node in session.get_inputs()}
    for found, expected in zip(session.run(None, fed), module(*given), strict=True):
        error = float((torch.from_numpy(found) - expected).abs().max())
        assert error <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("seat", each(EVERY, quick="window-text"))
def test_whole_sequences(seat: Seat, tmp_path: Path) -> None:
    image, masked = seat.shape.prefix is not None, seat.place == "text"
    module = Whole(seat.trained())
    example = streams(seat, 2, None if image else EXAMPLE)
    if masked:
        example.append(torch.ones(2, EXAMPLE, dtype=torch.bool))
    session = exported(module, example, not image, tmp_path / "mixer.onnx")
    for batch, tokens in ((3, 200), (1, 64), (2, 5), (1, 1)):
        given = streams(seat, batch, None if image else tokens)
        if masked:
            given.append(torch.arange(tokens).expand(batch, -1) < max(1, tokens - 2))
        assert_same(session, module, given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "seat",
    each([seat for seat in EVERY if seat.shape.causal], quick="retention-causal-text"),
)
def test_pieces(seat: Seat, tmp_path: Path) -> None:
    """One graph for a prompt, a token after it, and several."""
    module = Extended(seat.trained())
    example = [*streams(seat, 2, EXAMPLE), *module.mixer.empty_state(2).values()]
    session = exported(module, example, True, tmp_path / "mixer.onnx")
    state = [*module.mixer.empty_state(3).values()]
    for tokens in (EXAMPLE, 1, 70, 5, 1):
        given = [*streams(seat, 3, tokens), *state]
        assert_same(session, module, given)
        with torch.no_grad():
            state = list(module(*given)[1:])
