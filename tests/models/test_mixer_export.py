"""Every mixer exports to ONNX with dynamic batch and tokens, and says there what it says in torch.

One export holds all mixers of a shape, one output each: an export costs seconds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from autocomp.models.mixers import MIXERS
from autocomp.models.mixers.protocol import Mixer
from autocomp.testing.mixer_contract import Inputs, inputs, seats

NAMES = ("x", "query", "key", "value")
ALL = [MIXERS.get(name) for name in MIXERS.names()]


class Together(nn.Module):
    """All mixers of one shape, over the same inputs."""

    def __init__(self, place: str, masked: bool) -> None:
        super().__init__()
        self.mixers = nn.ModuleDict(
            {s.mixer.name: s.trained() for s in seats(*ALL) if s.place == place}
        )
        self.masked = masked

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        return tuple(mixer(*given) for mixer in self.mixers.values())


class Extended(nn.Module):
    """One more token, or several, from a state; the state behind them follows the output."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, given: tuple[Tensor, ...], state: dict[str, Tensor]) -> tuple[Tensor, ...]:
        out, behind = self.mixer.extend(*given, state)
        return (out, *(behind[name] for name in state))


def arrays(given: Inputs) -> dict[str, np.ndarray]:
    tensors = {name: getattr(given, name) for name in (*NAMES, "real")}
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("place", ["causal text", "text", "image"])
def test_whole_sequences(place: str, tmp_path: Path) -> None:
    masked, image = place == "text", place == "image"
    model = Together(place, masked).eval()
    shape = next(s for s in seats(*ALL) if s.place == place).shape
    example = inputs(shape, tokens=None if image else 70)
    batch, tokens = torch.export.Dim("batch", max=64), torch.export.Dim("tokens", max=4096)
    dims = {0: batch} if image else {0: batch, 1: tokens}
    headed = {0: batch} if image else {0: batch, 2: tokens}
    shapes = [dims, headed, headed, headed]
    given = [example.x, example.query, example.key, example.value]
    if masked:
        given.append(torch.ones(2, 70, dtype=torch.bool))
        shapes.append(dims)
    path = tmp_path / "mixers.onnx"
    torch.onnx.export(
        model,
        tuple(given),
        path,
        dynamo=True,
        opset_version=20,
        input_names=[*NAMES, "real"][: len(given)],
        output_names=[f"{name}_out" for name in model.mixers],
        dynamic_shapes=(tuple(shapes),),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    used = {node.name for node in session.get_inputs()}
    for count, length in ((3, 150), (1, 64), (2, 5)):
        other = inputs(shape, batch=count, tokens=None if image else length, seed=1)
        if masked:
            real = torch.arange(length).expand(count, -1) < length - 2
            other = other.changed({"real": real})
        fed = {name: array for name, array in arrays(other).items() if name in used}
        for name, found in zip(model.mixers, session.run(None, fed), strict=True):
            expected = other.through(model.mixers[name]).detach()  # type: ignore[arg-type]
            error = float((torch.from_numpy(found) - expected).abs().max())
            assert error <= 1e-5 * max(1.0, float(expected.abs().max())), (name, length, error)
