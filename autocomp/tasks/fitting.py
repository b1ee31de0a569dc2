"""Fitting a teacher on the distil split: the whole model, or a linear head on frozen features."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from autocomp.core.errors import ModelError, UserError
from autocomp.spec.task import TeacherSection
from autocomp.tasks.protocol import Task

_WARM_UP = 0.1
_WEIGHT_DECAY = 0.01
_CLIP = 1.0
_HEAD_PENALTY = 1e-2
_HEAD_STEPS = 200


def fit_full(
    model: nn.Module,
    task: Task,
    settings: TeacherSection,
    *,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train every weight: AdamW, linear warm-up and decay, clipped gradients, its own dropout.

    In place; `settings` gives epochs, learning rate and batch. The same seed gives the same weights
    on the same machine. Loshchilov & Hutter 2017, arXiv 1711.05101.

    Raises:
        UserError: when the loss is no longer finite.
    """
    steps = settings.epochs * math.ceil(len(task.splits["distil"]) / settings.batch)
    warm_up = max(1, round(_WARM_UP * steps))
    optimiser = torch.optim.AdamW(
        _parameter_groups(model), lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up)),
    )
    done = 0
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for epoch in range(settings.epochs):
            for batch in task.batches("distil", settings.batch, seed=seed + epoch):
                loss = task.loss(task.logits(model, batch), batch["labels"])
                if not bool(torch.isfinite(loss)):
                    raise UserError(
                        f"fitting the teacher diverged at step {done} of {steps} (loss "
                        f"{float(loss.detach())}). Lower task.teacher.lr, now {settings.lr:g}"
                    )
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
                optimiser.step()
                schedule.step()
                optimiser.zero_grad(set_to_none=True)
                done += 1
                if progress is not None:
                    progress(done, steps)
    model.eval()


def fit_head(
    model: nn.Module,
    task: Task,
    settings: TeacherSection,
    *,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fit the last linear layer on frozen features: logistic regression with an L2 penalty.

    The encoder runs once over the distil split (`progress` counts its batches of
    `settings.batch`); the head is then solved to convergence by L-BFGS on standardised features,
    so epochs and learning rate play no part, and the scaling is folded into the weights. In place.

    Raises:
        ModelError: if the model's last layer is not a linear `classifier` or `score`.
    """
    head = classification_head(model)
    features, labels = _features(model, head, task, settings.batch, progress)
    mean, scale = features.mean(dim=0), features.std(dim=0).clamp_min(1e-6)
    weight, bias = _logistic_regression((features - mean) / scale, labels, head.out_features)
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        if head.bias is not None:
            head.bias.copy_(bias - (weight / scale) @ mean)


def classification_head(model: nn.Module) -> nn.Linear:
    """The linear layer that gives the logits.

    Raises:
        ModelError: if there is none under a known name.
    """
    for name in ("classifier", "score", "classifier.out_proj"):
        with contextlib.suppress(AttributeError):
            head = model.get_submodule(name)
            if isinstance(head, nn.Linear):
                return head
    raise ModelError(
        f"{type(model).__name__} has no linear 'classifier' or 'score' to fit. "
        f"Use task.teacher.fit: full"
    )


def _parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight matrices decay; biases and norms do not."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": _WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]


def _features(
    model: nn.Module,
    head: nn.Linear,
    task: Task,
    batch: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of the head over the distil split `(N, D)`, float64, and labels `(N,)`."""
    captured: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0].double()))
    total = math.ceil(len(task.splits["distil"]) / batch)
    model.eval()
    try:
        with torch.no_grad():
            for done, inputs in enumerate(task.batches("distil", batch), start=1):
                task.logits(model, inputs)
                labels.append(inputs["labels"])
                if progress is not None:
                    progress(done, total)
    finally:
        hook.remove()
    return torch.cat(captured), torch.cat(labels)


def _logistic_regression(
    features: torch.Tensor, labels: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimise mean cross-entropy + penalty/2 ‖W‖²; weight `(classes, D)`, bias `(classes,)`."""
    weight = torch.zeros(classes, features.shape[1], dtype=features.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=features.dtype, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_HEAD_STEPS,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> float:
        solver.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels)
        loss = loss + _HEAD_PENALTY / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return cast(float, loss)

    solver.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
