"""What of a student is trained: everything but its embedding tables, in storage of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from autocomp.models.mixers.protocol import Mixer
from autocomp.models.modules import QuantEmbedding

MIXER_RATE = 3.0
"""Mixers learn this much faster: they are young where the rest was pre-trained."""


def trainable_parameters(student: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter, every one except embedding tables; the tables are frozen.

    They hold most of a small model's bytes and move little within the tokens a trial can afford.
    """
    frozen: set[int] = set()
    for module in student.modules():
        if isinstance(module, nn.Embedding | QuantEmbedding):
            frozen.update(id(parameter) for parameter in module.parameters())
    chosen = {}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(id(parameter) not in frozen and parameter.is_floating_point())
        if parameter.requires_grad:
            chosen[name] = parameter
    return chosen


def parameter_groups(
    student: nn.Module, parameters: Iterable[nn.Parameter], lr: float
) -> list[dict[str, Any]]:
    """Parameter groups: everything at `lr`, mixers at `MIXER_RATE` times that."""
    mixers = {
        id(parameter)
        for module in student.modules()
        if isinstance(module, Mixer)
        for parameter in module.parameters()
    }
    plain: list[nn.Parameter] = []
    young: list[nn.Parameter] = []
    for parameter in parameters:
        (young if id(parameter) in mixers else plain).append(parameter)
    groups = [{"params": plain, "lr": lr}, {"params": young, "lr": MIXER_RATE * lr}]
    return [group for group in groups if group["params"]]


def unshare(student: nn.Module) -> None:
    """Give the student its own storage: a stitched model shares what it did not replace.

    A head tied to the embedding table stays tied, so it is frozen with the table and stored once.
    """
    own: dict[int, nn.Parameter] = {}
    for module in student.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in own:
                own[id(parameter)] = nn.Parameter(parameter.detach().clone())
            setattr(module, name, own[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(
                name, buffer.detach().clone(), name not in module._non_persistent_buffers_set
            )
