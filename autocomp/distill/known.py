"""What the teacher says of the whole transfer set, computed once instead of in every pass.

A student a tenth as large is trained in less time than its teacher takes to run beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autocomp.core.candidate import Distillation
from autocomp.core.gate import Gate
from autocomp.distill.losses import LOSSES
from autocomp.distill.losses.protocol import Outputs, Reading
from autocomp.distill.outputs import observe
from autocomp.tasks.protocol import Array, Task
from autocomp.tasks.stored import stored_rows
from autocomp.tasks.teacher import Progress, teacher_logits

KEPT_BYTES = 2_000_000_000
"""Logits and hidden states beyond this are computed in every pass instead of kept on disk."""
SPARE = 2
"""So many times what is kept must be free on the disk, or it is not."""
BATCH = 32
_READ: tuple[Reading, ...] = ("hidden",)


@dataclass(frozen=True)
class Known:
    """The teacher's side of every example of the transfer set, in its order.

    Attributes:
        logits: `(N, C)`.
        hidden: states behind each layer, `(N, L, T, D)`, of examples that are not trimmed; `None`
            if they are not kept.
    """

    logits: Array
    hidden: Array | None = None

    def covers(self, reads: Collection[Reading]) -> bool:
        """Whether the teacher need not run for these."""
        return "attention" not in reads and ("hidden" not in reads or self.hidden is not None)

    def outputs(self, inputs: Mapping[str, torch.Tensor], reads: Collection[Reading]) -> Outputs:
        """What is known of a batch with `index`, trimmed or not."""
        at = inputs["index"].numpy()
        hidden: dict[int, torch.Tensor] = {}
        if self.hidden is not None and "hidden" in reads:
            states = torch.from_numpy(self.hidden[at])
            if "input_ids" in inputs:
                states = states[:, :, : inputs["input_ids"].shape[1]]
            hidden = dict(enumerate(states.unbind(1)))
        return Outputs(torch.from_numpy(self.logits[at]), hidden, {})


def known_side(
    teacher: nn.Module,
    task: Task,
    settings: Distillation,
    directory: Path,
    gate: Gate,
    progress: Progress,
    *,
    same_tokens: bool,
) -> Known | None:
    """What a training by these settings asks of the teacher, computed once and kept in `directory`.

    Hidden states are kept where they spare running the teacher: not where the student reads texts
    as other tokens, nor where a loss reads attention as well. Each batch holds the gate shared.
    `None` for language modelling, whose logits are too many, and where nothing is trained.

    Raises:
        StorageError: if the disk is full or refuses.
    """
    if task.num_labels is None or settings.tokens == 0:
        return None
    reads = {reading for name in settings.losses for reading in LOSSES.get(name).reads}
    if same_tokens and "hidden" in reads and "attention" not in reads:
        cache = directory / "teacher-transfer-hidden.npy"
        known = _with_hidden(teacher, task, cache, gate, progress)
        if known is not None:
            return known
    cache = directory / "teacher-transfer.npy"
    return Known(teacher_logits(teacher, task, "transfer", cache, gate=gate, progress=progress))


def _with_hidden(
    teacher: nn.Module, task: Task, cache: Path, gate: Gate, progress: Progress
) -> Known | None:
    """Rows of logits and hidden states; `None` where they are more than `KEPT_BYTES`, or than the
    disk has room for.
    """
    count = len(task.splits["transfer"])

    def outputs(limit: int | None = None) -> Iterator[tuple[Array, Array]]:
        for inputs in task.batches("transfer", BATCH, trim=False, limit=limit):
            with torch.inference_mode(), gate.working():
                found = observe(teacher, task, inputs, _READ)
                layers = [found.hidden[layer].float() for layer in sorted(found.hidden)]
                both = found.logits.float().numpy(), torch.stack(layers, dim=1).numpy()
            yield both

    def rows() -> Iterator[Array]:
        done = 0
        for logits, hidden in outputs():
            yield np.concatenate([logits, hidden.reshape(len(hidden), -1)], axis=1)
            done += len(logits)
            progress(done, count)

    logits, hidden = next(outputs(limit=1))
    if not cache.exists():
        wanted = count * (logits.nbytes + hidden.nbytes)
        cache.parent.mkdir(parents=True, exist_ok=True)
        if wanted > KEPT_BYTES or shutil.disk_usage(cache.parent).free < SPARE * wanted:
            return None
    stored = stored_rows(cache, count, rows)
    classes = logits.shape[1]
    return Known(stored[:, :classes], stored[:, classes:].reshape(count, *hidden.shape[1:]))
