"""Does the exported model compute what was trained, up to the rounding of its activations?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from autocomp.core.errors import InternalError
from autocomp.core.gate import Gate
from autocomp.distill.trainer import DivergedError
from autocomp.models.surgery import blocks
from autocomp.targets.protocol import Artifact, Target
from autocomp.tasks.protocol import Array, Task

TOLERANCE = 0.05
"""Largest mean difference between the artifact's logits and torch's, relative to their spread..."""
UNSTEADINESS = 3.0
"""... plus this many times what a change no larger than the runtime's rounding makes in torch's:
one part in a million where it computes in float32, 2⁻⁹ in bfloat16 (a target's `rounding`)."""
FLOAT_ROUNDING = 1e-6
CHECKED_BATCHES = 4


@torch.no_grad()
def check_agreement(
    target: Target, artifact: Artifact, student: nn.Module, task: Task, batch: int, gate: Gate
) -> None:
    """Compare logits on a few batches of the calibrate split, each run with the gate held shared.

    Raises:
        DivergedError: if the trained model's logits are not finite.
        InternalError: if the logits differ by more than rounding explains.
    """
    found, expected, nudged = [], [], []
    rounding = float(getattr(target, "rounding", FLOAT_ROUNDING))
    for inputs in islice(task.batches("calibrate", batch), CHECKED_BATCHES):
        feeds = {name: inputs[name] for name in task.input_names}
        with gate.working():
            expected.append(task.logits(student, feeds).numpy())
        if not np.isfinite(expected[-1]).all():
            raise DivergedError("the trained model's logits are not finite")
        with gate.working(), slightly_changed(student, rounding):
            nudged.append(task.logits(student, feeds).numpy())
        with gate.working():
            found.append(target.run(artifact, {name: t.numpy() for name, t in feeds.items()}))
    difference, allowed = disagreement(found, expected, nudged)
    if not difference <= allowed:
        raise InternalError(
            f"the exported model's logits differ from the trained model's by {difference:.1%} of "
            f"their spread, more than the {allowed:.1%} that rounding explains"
        )


@contextmanager
def slightly_changed(model: nn.Module, rounding: float = FLOAT_ROUNDING) -> Iterator[None]:
    """Within it the first block's hidden states are larger and smaller in turn by `rounding`."""

    def nudged(hidden: torch.Tensor) -> torch.Tensor:
        signs = 1 - 2 * (torch.arange(hidden.shape[-1]) % 2).to(hidden.dtype)
        return hidden * (1 + rounding * signs)

    def change(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return (nudged(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": nudged(kwargs["hidden_states"])}

    handle = blocks(model)[0].register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def disagreement(
    found: Sequence[Array], expected: Sequence[Array], nudged: Sequence[Array]
) -> tuple[float, float]:
    """Mean difference of logits relative to their spread, and how large it may be.

    8-bit activations make a model discontinuous: the last digit of a float decides how a value is
    rounded, and depth amplifies that (DINOv2 in 8 bits: 4% of the spread). What `nudged`, the
    model after a change no larger than a runtime's own reordering of sums, differs by is therefore
    not the export's fault.
    """
    spreads = [float(logits.std()) or 1.0 for logits in expected]

    def mean(others: Sequence[Array]) -> float:
        pairs = zip(others, expected, spreads, strict=True)
        return float(np.mean([np.abs(a - b).mean() / spread for a, b, spread in pairs]))

    return mean(found), TOLERANCE + UNSTEADINESS * mean(nudged)
