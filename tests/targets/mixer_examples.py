"""Models with mixers in them, and what the tests of their graphs share."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from target_examples import SEQUENCE
from torch import nn

from autocomp.models.mixers.protocol import Mixer
from autocomp.models.seat import install_mixer, mixer_shape
from autocomp.spec.schema import TargetSection, WorkloadSection
from autocomp.targets import make_target
from autocomp.targets.generation import carried, feeds

RUNTIMES = ("onnxruntime", "openvino")


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
        mixer = kind(mixer_shape(unit))
        install_mixer(student, unit, mixer)
    return student.eval()


def attention(units: Any, layer: int) -> Any:
    return next(unit for unit in units if unit.name == f"layers.{layer}.attention")


def arrays(task: Any, batch: int, sequence: int) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in task.example_inputs(batch, sequence).items()}


def in_pieces(session: Any, ids: np.ndarray, cuts: list[int]) -> np.ndarray:
    """Logits of `ids` read piece by piece, what one leaves given to the next."""
    first = feeds(session, {"input_ids": ids})
    pasts = carried(first)
    past = {name: first[name] for name in pasts}
    parts = []
    for piece in np.split(ids, cuts, axis=1):
        logits, *present = session.run(["logits", *pasts.values()], {"input_ids": piece, **past})
        past = dict(zip(pasts, present, strict=True))
        parts.append(logits)
    return np.concatenate(parts, axis=1)
