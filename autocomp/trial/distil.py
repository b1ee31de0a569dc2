"""Logit distillation of a stitched student, through its quantisation.

The student's quantised layers are trained with straight-through gradients on the grid they were
given, so that what is exported afterwards is what was trained. Embedding tables stay fixed: they
hold most of a small model's bytes and move little within the tokens a trial can afford.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from autocomp.core.candidate import Distillation
from autocomp.core.errors import InternalError
from autocomp.core.gate import Gate
from autocomp.models.mixers.protocol import Mixer
from autocomp.models.modules import QuantEmbedding
from autocomp.tasks.divergence import teacher_kl
from autocomp.tasks.protocol import Task

WARM_UP = 0.1
MAX_GRAD_NORM = 1.0
MIXER_RATE = 3.0
"""Mixers learn this much faster: they are young where the rest was pre-trained."""

BLOWN_UP = 10.0
"""Clipped gradients keep a diverging loss finite; this often its first value is divergence too."""


class DivergedError(InternalError):
    """Training left the finite numbers, or all reason; the trial fails with this as its cause."""


@dataclass(frozen=True)
class DistillationResult:
    """What training did: real tokens and steps seen, first and last mean loss (nats)."""

    tokens: int
    steps: int
    first_loss: float
    last_loss: float


def logit_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Temperature-scaled KL(teacher ‖ student), times τ² (Hinton et al., 2015, section 2.1).

    Logits are `(..., C)`; the mean over everything before the last axis is returned, in nats.
    """
    return teacher_kl(teacher, student, temperature=temperature) * temperature**2


def trainable_parameters(student: nn.Module) -> list[nn.Parameter]:
    """Every parameter except embedding tables; the tables are frozen."""
    frozen: set[int] = set()
    for module in student.modules():
        if isinstance(module, nn.Embedding | QuantEmbedding):
            frozen.update(id(parameter) for parameter in module.parameters())
    chosen = []
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) not in frozen and parameter.is_floating_point())
        if parameter.requires_grad:
            chosen.append(parameter)
    return chosen


def _groups(
    student: nn.Module, parameters: Sequence[nn.Parameter], lr: float
) -> list[dict[str, Any]]:
    """Parameter groups: everything at `lr`, mixers at `MIXER_RATE` times that."""
    mixers = {
        id(parameter)
        for module in student.modules()
        if isinstance(module, Mixer)
        for parameter in module.parameters()
    }
    plain = [parameter for parameter in parameters if id(parameter) not in mixers]
    young = [parameter for parameter in parameters if id(parameter) in mixers]
    groups = [{"params": plain, "lr": lr}, {"params": young, "lr": MIXER_RATE * lr}]
    return [group for group in groups if group["params"]]


def _unshare(student: nn.Module) -> None:
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


def distil(
    student: nn.Module,
    teacher: nn.Module,
    task: Task,
    settings: Distillation,
    *,
    batch: int,
    seed: int,
    gate: Gate,
    teacher_logits: np.ndarray[Any, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DistillationResult:
    """Train `student` in place on the distil split until `settings.tokens` real tokens were seen.

    AdamW, linear warm-up over the first tenth, cosine decay to zero, gradients clipped to norm 1.
    The learning rate follows tokens, not steps, so that batches of short texts weigh as little as
    they hold. Each step holds the gate shared, so that a measurement can come between two steps.

    Args:
        teacher_logits: those of the whole distil split, in its order, if they are at hand; else
            the teacher runs beside the student.

    Raises:
        DivergedError: when the loss is no longer finite, or ends `BLOWN_UP` times higher than it
            began and above what a student that knows nothing would have.
    """
    if settings.tokens == 0:
        return DistillationResult(0, 0, 0.0, 0.0)
    _unshare(student)
    parameters = trainable_parameters(student)
    groups = _groups(student, parameters, settings.lr)
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    peaks = [float(group["lr"]) for group in groups]
    student.train()
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    seen, step, epoch = 0, 0, 0
    losses: list[float] = []
    ignorant = math.inf
    while seen < settings.tokens:
        for inputs in task.batches("distil", batch, seed=seed + epoch, index=True):
            with gate.working():
                done = seen / settings.tokens
                rate = min(1.0, (done + 1e-3) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * done))
                for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                    group["lr"] = peak * rate
                target = _target(task, teacher, teacher_logits, inputs)
                ignorant = settings.temperature**2 * math.log(target.shape[-1])
                loss = logit_loss(task.logits(student, inputs), target, settings.temperature)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise DivergedError(
                        f"distillation diverged at step {step} (loss {value}) with learning rate "
                        f"{settings.lr:g}"
                    )
                optimiser.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
                optimiser.step()
            losses.append(value)
            seen += task.tokens(inputs)
            step += 1
            if progress is not None:
                progress(min(seen, settings.tokens), settings.tokens)
            if seen >= settings.tokens:
                break
        epoch += 1
    student.eval()
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    if last > max(BLOWN_UP * losses[0], ignorant):
        raise DivergedError(
            f"distillation diverged: the loss rose from {losses[0]:.3g} to {last:.3g} nats in "
            f"{step} steps with learning rate {settings.lr:g}"
        )
    return DistillationResult(seen, step, first, last)


@torch.no_grad()
def _target(
    task: Task,
    teacher: nn.Module,
    known: np.ndarray[Any, Any] | None,
    inputs: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The teacher's logits for a batch, looked up or computed."""
    if known is None:
        return task.logits(teacher, inputs)
    return torch.from_numpy(known[inputs["index"].numpy()])
