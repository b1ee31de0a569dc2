"""Distillation of a stitched student, through its quantisation.

The student's quantised layers are trained with straight-through gradients on the grid they were
given, so that what is exported afterwards is what was trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autocomp.core.candidate import Distillation
from autocomp.core.errors import InternalError
from autocomp.core.gate import Gate
from autocomp.distill.checkpoint import Training, read_checkpoint, write_checkpoint
from autocomp.distill.known import Known
from autocomp.distill.objective import Objective
from autocomp.distill.on_policy import continued, is_sampled
from autocomp.distill.schedule import rate
from autocomp.distill.student import parameter_groups, trainable_parameters, unshare
from autocomp.tasks.protocol import Task

MAX_GRAD_NORM = 1.0

_RATES = ("attention_dropout", "drop_prob")
"""Attributes in which modules of transformers keep rates of dropout."""

BLOWN_UP = 10.0
"""Clipped gradients keep a diverging loss finite; this often its first value is divergence too."""

Progress = Callable[[int, int], None]


class DivergedError(InternalError):
    """Training left the finite numbers, or all reason; the trial fails with this as its cause."""


@dataclass(frozen=True)
class DistillationResult:
    """What training did so far: real tokens and steps seen, first and last mean loss (nats)."""

    tokens: int
    steps: int
    first_loss: float
    last_loss: float


class Trainer:
    """One student's training, all at once or slice by slice.

    AdamW, linear warm-up over the first tenth, then the settings' schedule, gradients clipped to
    norm 1. The learning rate follows tokens, not steps, so that batches of short texts weigh as
    little as they hold; it is that of `settings.tokens`, however the training is sliced. Each step
    holds the gate shared, so that a measurement can come between two steps.

    Call sequence:

        trainer = Trainer(student, teacher, task, settings, batch=32, seed=0, gate=gate)
        trainer.load(path)           # if an earlier process saved one
        trainer.advance(50_000)      # the student is ready to be looked at
        trainer.save(path)
        trainer.advance(100_000)

    Args:
        student: trained in place; it is given storage of its own at once.
        settings: with `tokens` above zero.
        batch: examples per step.
        seed: of the order of the examples.
        known: the teacher's side of the whole transfer set, if it is at hand; else the teacher
            runs beside the student.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        task: Task,
        settings: Distillation,
        *,
        batch: int,
        seed: int,
        gate: Gate,
        known: Known | None = None,
    ) -> None:
        if settings.tokens <= 0:
            raise ValueError("a training sees at least one token")
        self._student, self._task, self._settings = student, task, settings
        self._batch, self._seed, self._gate = batch, seed, gate
        self._objective = Objective(teacher, task, settings, known)
        unshare(student)
        self._parameters = trainable_parameters(student)
        groups = parameter_groups(student, self._parameters.values(), settings.lr)
        self._optimiser = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self._peaks = [float(group["lr"]) for group in groups]
        _without_dropout(student)
        self._losses: list[float] = []
        self._training = Training()

    @property
    def result(self) -> DistillationResult:
        """What training did so far; the mean losses are those of its first and last tenth."""
        losses, training = self._losses, self._training
        tenth = max(1, len(losses) // 10)
        first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
        return DistillationResult(training.tokens, training.steps, first, last)

    def advance(self, tokens: int, progress: Progress | None = None) -> DistillationResult:
        """Train until `tokens` real tokens were seen in all, never beyond `settings.tokens`.

        Returns at the end of the step that reaches them, with the student in evaluation mode.

        Args:
            progress: told tokens seen and tokens wanted, after each step.

        Raises:
            DivergedError: when the loss is no longer finite, or, at the end of the whole training,
                is `BLOWN_UP` times higher than it began and above what a student that knows
                nothing would have.
        """
        wanted = min(tokens, self._settings.tokens)
        self._student.train()
        while self._training.tokens < wanted:
            self._pass(wanted, progress)
        self._student.eval()
        if self._training.tokens >= self._settings.tokens:
            self._check_end()
        return self.result

    def save(self, path: Path) -> None:
        """Write what `load` needs to go on from here: one safetensors file, whole or not at all.

        Raises:
            StorageError: if the disk is full or refuses.
        """
        parts = (self._parameters, self._optimiser, self._losses, self._training, self._about())
        with self._gate.working():
            write_checkpoint(path, *parts)

    def load(self, path: Path) -> None:
        """Go on where the saved training stood, to the same parameters bit for bit.

        Raises:
            CheckpointError: if the file is missing, damaged, of other settings or another student.
        """
        parts = (self._parameters, self._optimiser, self._about())
        with self._gate.working():
            self._losses, self._training = read_checkpoint(path, *parts)

    def _about(self) -> dict[str, Any]:
        return {"settings": self._settings.to_json(), "batch": self._batch, "seed": self._seed}

    def _pass(self, wanted: int, progress: Progress | None) -> None:
        """The rest of a pass over the transfer set, or until enough tokens were seen."""
        at = self._training
        batches = self._task.batches(
            "transfer", self._batch, seed=self._seed + at.epoch, index=True
        )
        for inputs in islice(batches, at.position, None):
            self._step(inputs)
            seen = self._training.tokens
            if progress is not None:
                progress(min(seen, wanted), wanted)
            if seen >= wanted:
                return
        at = self._training
        self._training = Training(at.tokens, at.steps, at.epoch + 1, 0, at.ignorant)

    def _step(self, inputs: Mapping[str, torch.Tensor]) -> None:
        settings, at = self._settings, self._training
        tokens = self._task.tokens(inputs)
        if is_sampled(at.steps, settings.on_policy):
            draw = (self._seed * 1_000_003 + at.steps) % 2**63
            inputs = continued(self._student, self._task, inputs, draw, self._gate)
        with self._gate.working():
            share = rate(settings.schedule, at.tokens / settings.tokens)
            for group, peak in zip(self._optimiser.param_groups, self._peaks, strict=True):
                group["lr"] = peak * share
            loss, classes = self._objective(self._student, inputs)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise DivergedError(
                    f"distillation diverged at step {at.steps} (loss {value}) with learning rate "
                    f"{settings.lr:g}"
                )
            self._optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self._parameters.values(), MAX_GRAD_NORM)
            self._optimiser.step()
        self._losses.append(value)
        self._training = Training(
            at.tokens + tokens,
            at.steps + 1,
            at.epoch,
            at.position + 1,
            self._objective.ignorant(classes),
        )

    def _check_end(self) -> None:
        last, first = self.result.last_loss, self._losses[0]
        if last > max(BLOWN_UP * first, self._training.ignorant):
            raise DivergedError(
                f"distillation diverged: the loss rose from {first:.3g} to {last:.3g} nats in "
                f"{self._training.steps} steps with learning rate {self._settings.lr:g}"
            )


def _without_dropout(student: nn.Module) -> None:
    """It draws by no seed; some models keep its rate as a number of their own."""
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _RATES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def distil(
    student: nn.Module,
    teacher: nn.Module,
    task: Task,
    settings: Distillation,
    *,
    batch: int,
    seed: int,
    gate: Gate,
    known: Known | None = None,
    progress: Progress | None = None,
) -> DistillationResult:
    """Train `student` in place to the end, as `Trainer` does; without tokens it is left alone.

    Raises:
        DivergedError: as `Trainer.advance`.
    """
    if settings.tokens == 0:
        return DistillationResult(0, 0, 0.0, 0.0)
    trainer = Trainer(
        student,
        teacher,
        task,
        settings,
        batch=batch,
        seed=seed,
        gate=gate,
        known=known,
    )
    return trainer.advance(settings.tokens, progress)
