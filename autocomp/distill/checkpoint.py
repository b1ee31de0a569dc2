"""A half-trained student on disk: parameters, AdamW's moments, how far training has come.

One safetensors file; counters and what they belong to stand in its header. Only what training
changes is kept: the student is stitched anew and its trained parameters are read into it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from autocomp.core.errors import InternalError
from autocomp.core.files import write_atomic

FORMAT_VERSION = 1
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class CheckpointError(InternalError):
    """A checkpoint that is damaged, or that belongs to another training."""


@dataclass(frozen=True)
class Training:
    """How far training has come.

    Attributes:
        tokens: real tokens seen.
        steps: steps taken.
        epoch: passes over the distil split that are complete.
        position: batches of the current pass that were trained on.
        ignorant: the loss of a student that knows nothing, in nats.
    """

    tokens: int = 0
    steps: int = 0
    epoch: int = 0
    position: int = 0
    ignorant: float = 0.0


def write_checkpoint(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    losses: list[float],
    training: Training,
    about: Mapping[str, Any],
) -> None:
    """Write the file, whole or not at all.

    Args:
        about: what the training is of; `read_checkpoint` refuses a file that says otherwise.

    Raises:
        StorageError: if the disk is full or refuses; what `path` was before stays.
    """
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for name, parameter in parameters.items():
        tensors[f"parameter|{name}"] = parameter.detach().contiguous()
        for moment in _MOMENTS:
            if moment in optimiser.state[parameter]:
                tensors[f"{moment}|{name}"] = optimiser.state[parameter][moment].contiguous()
    header = {"format": FORMAT_VERSION, "about": dict(about), "training": vars(training)}
    metadata = {"distillation": json.dumps(header)}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def read_checkpoint(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    about: Mapping[str, Any],
) -> tuple[list[float], Training]:
    """Read parameters and moments in place; returns the losses so far and the counters.

    Raises:
        CheckpointError: if the file is missing, damaged or of another training; nothing is changed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["distillation"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        version, known = header["format"], header["about"]
        losses, training = tensors.pop("losses").tolist(), Training(**header["training"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint of a distillation ({error}). Remove it to "
            f"train from the start"
        ) from error
    _check(path, version, known, about)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    _check_shapes(path, tensors, shapes)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter|{name}"])
            moments = {
                m: tensors[f"{m}|{name}"].clone() for m in _MOMENTS if f"{m}|{name}" in tensors
            }
            optimiser.state.pop(parameter, None)
            if moments:  # absent where no gradient ever came
                optimiser.state[parameter] = moments
    return losses, training


def _check(path: Path, version: int, known: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}, this version reads {FORMAT_VERSION}. Remove it to train "
            f"from the start"
        )
    for key in sorted({*known, *about}):
        if known.get(key) != about.get(key):
            raise CheckpointError(
                f"{path} is of another training: {key} is {known.get(key)} there and "
                f"{about.get(key)} here. Continue with the same settings, or remove it"
            )


def _check_shapes(
    path: Path, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    stored = {
        name.removeprefix("parameter|"): tuple(tensor.shape)
        for name, tensor in tensors.items()
        if name.startswith("parameter|")
    }
    for name in sorted({*stored, *shapes}):
        if stored.get(name) != shapes.get(name):
            there, here = (known.get(name, "absent") for known in (stored, shapes))
            raise CheckpointError(
                f"{path} is of another student: {name} is {there} there and {here} here. Continue "
                f"with the same candidate, or remove it"
            )
