"""Mixers in lowered graphs: equal to torch on both runtimes, whole sequences and token by token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from target_examples import SEQUENCE, TextTask, quantise_unit, small_model
from torch import Tensor, nn

from autocomp.core.errors import InternalError
from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import SiteFormat, dense_format
from autocomp.models.factors import LowRank
from autocomp.models.mixers import MIXERS
from autocomp.models.mixers.protocol import Mixer, MixerShape, State, hidden_padding, repeated
from autocomp.models.seat import install_mixer, mixer_shape
from autocomp.models.surgery import replace_module, skip
from autocomp.models.tokens import install_tokens
from autocomp.spec.schema import TargetSection, WorkloadSection
from autocomp.targets import make_target
from autocomp.targets.generation import carried, feeds, generate

RUNTIMES = ("onnxruntime", "openvino")
CAUSAL = ("llama", "gpt2", "qwen3")


class Convolved(Mixer):
    """Values convolved over three tokens, times a gate read from x, plus a decayed sum.

    It has all that lowering must get right: parameters, a buffer, an input beside the projections,
    a window, a sum, a query and a key that are not read.
    """

    name, summary, paper, reads = "convolved", "", "", ("value",)

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        width = shape.heads * shape.head_dim
        generator = torch.Generator().manual_seed(3)
        self.kernel = nn.Parameter(torch.randn(width, 1, 3, generator=generator) * 0.5)
        self.gate = nn.Linear(shape.hidden, width)
        nn.init.normal_(self.gate.weight, std=0.2, generator=generator)
        self.register_buffer("gain", torch.tensor(1.5))

    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None
    ) -> Tensor:
        (value,) = hidden_padding(real, repeated(self.shape.heads, value))
        lead = 2 if self.shape.causal else 1
        return self._mixed(x, nn.functional.pad(value, (0, 0, lead, 2 - lead)))

    def _mixed(self, x: Tensor, padded: Tensor) -> Tensor:
        flat = padded.transpose(2, 3).flatten(1, 2)  # (B, H·D, T + 2)
        out = nn.functional.conv1d(flat, self.kernel, groups=flat.shape[1]).transpose(1, 2)
        out = out * torch.sigmoid(self.gate(x)) * self.gain
        return out.unflatten(-1, (self.shape.heads, -1)).transpose(1, 2)

    def empty_state(self, batch: int) -> State:
        return {"last": torch.zeros(batch, self.shape.heads, 2, self.shape.head_dim)}

    def extend(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, state: State
    ) -> tuple[Tensor, State]:
        padded = torch.cat([state["last"], repeated(self.shape.heads, value)], dim=2)
        return self._mixed(x, padded), {"last": padded[:, :, -2:]}


class Square(Mixer):
    """Every patch takes its right neighbour's value in its row; leading tokens keep theirs."""

    name, summary, paper, reads = "square", "", "", ("value",)

    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None
    ) -> Tensor:
        assert self.shape.prefix is not None
        patches = value[:, :, self.shape.prefix :]
        side = int(patches.shape[2] ** 0.5)
        if side * side != patches.shape[2]:
            raise ValueError(f"{patches.shape[2]} patches are no square")
        rows = patches.unflatten(2, (side, side)).roll(-1, dims=3).flatten(2, 3)
        return torch.cat([value[:, :, : self.shape.prefix], rows], dim=2)


ELU = MIXERS.get("elu")
assert ELU is not None


def target(runtime: str, **workload: int) -> Any:
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="the runtime is an extra")
    workload = workload or {"sequence": SEQUENCE}
    return make_target(TargetSection(runtime=runtime, workload=WorkloadSection(**workload)))


def with_mixers(
    layout: str, model: nn.Module, units: Any, mixers: dict[int, type[Mixer]]
) -> nn.Module:
    student = copy.deepcopy(model)
    for layer, kind in mixers.items():
        unit = attention(units, layer)
        torch.manual_seed(layer)
        mixer = kind(mixer_shape(unit, causal=layout in CAUSAL))
        install_mixer(student, unit, mixer)
    return student.eval()


def attention(units: Any, layer: int) -> Any:
    return next(unit for unit in units if unit.name == f"layers.{layer}.attention")


def arrays(task: Any, batch: int, sequence: int) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in task.example_inputs(batch, sequence).items()}


MIXED = {"elu": {0: ELU}, "both": {0: Convolved, 1: ELU}, "convolved": {0: Convolved, 1: Convolved}}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("layout", ["bert", "llama", "dinov2"])
@pytest.mark.parametrize("mixers", MIXED.values(), ids=MIXED)
def test_lowered_equals_torch(exported, layout, mixers, runtime, tmp_path):
    model, units, task, skeleton = exported(layout)
    student = with_mixers(layout, model, units, mixers)
    before = skeleton.SerializeToString()
    the = target(runtime)
    artifact = the.write(the.lower(skeleton, student, units), tmp_path)
    for shape in ((1, 12), (3, 5), (2, 1)):
        assert the.verify(artifact, student, arrays(task, *shape)) < 1e-4
    assert skeleton.SerializeToString() == before
    assert artifact.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
