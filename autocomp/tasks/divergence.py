"""Divergence of a model from its teacher: KL(teacher ‖ student), in nats.

Two implementations of one formula: numpy (float64, for artifacts and records) and torch (for
screening and as a distillation loss). Hinton, Vinyals & Dean 2015, arXiv 1503.02531.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def kl_per_example(
    teacher_logits: npt.NDArray[Any],
    student_logits: npt.NDArray[Any],
    mask: npt.NDArray[Any] | None = None,
) -> npt.NDArray[np.float64]:
    """KL(teacher ‖ student) of each example, nats.

    Logits are `(N, C)`, or `(N, T, V)` with an optional `mask` `(N, T)`: then each example is the
    mean over its real positions. Returns `(N,)`.
    """
    teacher = log_softmax(teacher_logits)
    divergence: npt.NDArray[np.float64]
    divergence = (np.exp(teacher) * (teacher - log_softmax(student_logits))).sum(axis=-1)
    if divergence.ndim == 1:
        return divergence
    weight = np.ones(divergence.shape) if mask is None else mask.astype(np.float64)
    return np.average(divergence, axis=1, weights=weight)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, widened if it is narrower than float32."""
    return tensor.float() if tensor.itemsize < 4 else tensor


def teacher_kl(
    teacher_logits: torch.Tensor,
    student_logits: torch.Tensor,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """KL(teacher ‖ student) as a differentiable scalar, nats.

    Logits are `(B, C)`, or `(B, T, V)` with an optional `mask` `(B, T)`. The mean is over examples,
    or over real positions. Both sides are divided by `temperature`; the T² of a distillation loss
    is left to the caller.
    """
    teacher = (at_least_float32(teacher_logits) / temperature).log_softmax(-1)
    student = (at_least_float32(student_logits) / temperature).log_softmax(-1)
    divergence = (teacher.exp() * (teacher - student)).sum(dim=-1)
    if mask is None:
        return divergence.mean()
    weight = mask.to(divergence.dtype)
    return (divergence * weight).sum() / weight.sum().clamp_min(1.0)
