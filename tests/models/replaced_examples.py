"""A teacher with recorded inputs, and a mixer with parameters of its own: for tests of `replace`.

Imported by the tests of several rooms.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from model_examples import EXAMPLES, Example
from torch import Tensor, nn

from autocomp.calibrate.stats import RecordedStats, load_stats, recording_path
from autocomp.calibrate.stream import calibrate
from autocomp.core.unit import Unit
from autocomp.library.build import load_unit
from autocomp.models.conversion import save_model
from autocomp.models.mixers import MIXERS
from autocomp.models.mixers.protocol import Mixer, MixerShape, repeated
from autocomp.operators.protocol import UnitState


class Distances(Mixer):
    """A softmax over learnt weights of (query, key) distances; keys are not read."""

    name, summary = "distances", "A learnt weight per distance and head."
    paper, version, reads = "", 3, ("query", "value")

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        self.scores = nn.Parameter(torch.randn(shape.heads, 31) * 0.01)
        self.register_buffer("scale", torch.ones(1))

    @classmethod
    def refuses(cls, shape: MixerShape) -> str | None:
        return "it knows five heads at most" if shape.heads > 6 else None

    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None
    ) -> Tensor:
        tokens = value.shape[2]
        place = torch.arange(tokens)
        scores = self.scores[:, place[None, :] - place[:, None] + 15]
        hidden = torch.zeros(tokens, tokens, dtype=torch.bool)
        if self.shape.causal:
            hidden = place[None, :] > place[:, None]
        if real is not None:
            hidden = hidden | ~real[:, None, None, :]
        weights = scores.masked_fill(hidden, -1e9).softmax(-1)
        gate = torch.sigmoid(query.mean(-1, keepdim=True))
        return (weights @ repeated(self.shape.heads, value)) * gate * self.scale


def register() -> None:
    """Make `Distances` known."""
    if "distances" not in MIXERS:
        MIXERS.register("distances", Distances)


@dataclass
class Case:
    """Attention of the second layer of a tiny teacher, calibrated."""

    example: Example
    model: nn.Module
    unit: Unit
    state: UnitState
    stats: RecordedStats
    path: Path
    batches: list[dict[str, Tensor]]


def sequences(example: Example, batch: int = 24, count: int = 2) -> list[dict[str, Tensor]]:
    """Batches of texts of 5 to 12 tokens, or of images."""
    draw = torch.Generator().manual_seed(4)
    if example.task == "image-classification":
        return [
            {"pixel_values": torch.randn(batch, 3, 16, 16, generator=draw)} for _ in range(count)
        ]
    batches = []
    for index in range(count):
        tokens = 12 - index
        ids = torch.randint(2, 50, (batch, tokens), generator=draw)
        lengths = torch.randint(5, tokens + 1, (batch,), generator=draw)
        lengths[0] = tokens
        mask = (torch.arange(tokens)[None, :] < lengths[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def calm(model: nn.Module) -> nn.Module:
    """The model with attention less peaked than that of large random weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("query", "key", "q_proj", "k_proj", "c_attn")):
                parameter.mul_(0.3)
    return model


def case(name: str, root: Path, layer: int = 1, **options: Any) -> Case:
    """Calibrated, with recorded inputs."""
    register()
    example = EXAMPLES[name]
    model = calm(example.model())
    save_model(model, root / "teacher")
    units = example.units()
    unit = next(u for u in units if u.name == f"layers.{layer}.attention")
    batches = sequences(example)
    directory = root / "stats"
    for _ in calibrate(model, units, batches, directory, record=[unit.name], **options):
        pass
    path = directory / f"{unit.name}.safetensors"
    return Case(
        example,
        model,
        unit,
        load_unit(root / "teacher", unit),
        RecordedStats(load_stats(path), recording_path(path)),
        root / "teacher",
        batches,
    )
