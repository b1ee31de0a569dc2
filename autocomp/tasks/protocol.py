"""What a task is: the protocol and the plain data it hands out. No torch at import.

Call sequence:

    task = make_task(spec, model_path)             # reads, splits, encodes
    for batch in task.batches("distil", 32, seed=0):   # torch tensors, trimmed, shuffled
        logits = task.logits(model, batch)
        loss = task.loss(logits, batch["labels"])
    task.evaluate(run, "search", teacher=teacher_logits)   # an exported artifact, on its runtime
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from autocomp.spec.schema import WorkloadSection
    from autocomp.spec.task import TaskSection

Array = npt.NDArray[Any]
Split = Literal["calibrate", "distil", "search", "report", "transfer"]
DRAWN: tuple[Split, ...] = ("calibrate", "distil", "search", "report")
"""Splits the labelled data is divided into: disjoint."""

SPLITS: tuple[Split, ...] = (*DRAWN, "transfer")
"""All there are. The transfer set (Hinton, Vinyals & Dean, 2015) is what students are distilled on:
the distil split, and after it what texts there are without labels."""

NO_LABEL = -100
"""The label of an example without one, which losses leave out (torch's own convention)."""

Run = Callable[[dict[str, Array]], Array]
"""An artifact on its runtime: named inputs of fixed shape to logits."""


@dataclass(frozen=True)
class Encoded:
    """A split, ready for the model.

    Attributes:
        inputs: input name → array, first axis the examples. Text: `input_ids`, `attention_mask`
            int64 `(N, T)`, padded on the right. Images: `pixel_values` float32 `(N, 3, S, S)`.
            Language modelling: `input_ids` int64 `(N, T)`, no padding.
        labels: int64 `(N,)`, `NO_LABEL` where there is none; for language modelling `(N, T)`, equal
            to `input_ids`.
    """

    inputs: Mapping[str, Array]
    labels: Array

    def __len__(self) -> int:
        return len(self.labels)

    def followed_by(self, other: Encoded) -> Encoded:
        """These examples and then the other ones."""
        inputs = {
            name: np.concatenate([array, other.inputs[name]]) for name, array in self.inputs.items()
        }
        return Encoded(inputs, np.concatenate([self.labels, other.labels]))


@dataclass(frozen=True)
class Quality:
    """How good logits are on a split.

    Attributes:
        value: higher is better, in [0, 1]: accuracy, or exp(−NLL) = 1 / perplexity.
        metric: the metric's own name.
        metric_value: the metric in its own sense (a perplexity is better when lower).
        per_example: float64 `(N,)`, higher is better: 1 or 0 for right or wrong, or the mean log
            likelihood per token, in nats. `Task.aggregate` turns any resample of it into a value.
            Intervals are given where that is the mean, or exp of the mean (`front.noise`).
    """

    value: float
    metric: str
    metric_value: float
    per_example: Array = field(repr=False)

    def metric_json(self) -> dict[str, Any]:
        """`{"name": "perplexity", "value": 87.1}`."""
        return {"name": self.metric, "value": self.metric_value}


@dataclass(frozen=True)
class Evaluation:
    """An artifact evaluated on a split.

    Attributes:
        quality: the task metric.
        teacher_kl: mean KL(teacher ‖ artifact) in nats; `None` without a teacher.
        kl_per_example: float64 `(N,)`, or `None`.
        logits: float32 `(N, C)`; `None` for language modelling, where `(N, T, V)` is too large.
    """

    quality: Quality
    teacher_kl: float | None = None
    kl_per_example: Array | None = field(default=None, repr=False)
    logits: Array | None = field(default=None, repr=False)


class Task(Protocol):
    """Data, metric and loss of one task. Plain data: picklable, holds no tokenizer and no model.

    Attributes:
        name: as written in a spec.
        summary: one sentence, for `autocomp ls tasks`.
        metric_name: what `Quality.metric` says.
        num_labels: classes; `None` for language modelling.
        label_names: in the order of the logits.
        splits: split → examples; encoded at first use.
        input_names: inputs of the model, in order.
        dynamic_axes: input → {axis: name}, for export.
    """

    name: str
    summary: str
    metric_name: str
    num_labels: int | None
    label_names: tuple[str, ...]
    splits: Mapping[Split, Encoded]
    input_names: tuple[str, ...]
    dynamic_axes: dict[str, dict[int, str]]

    @classmethod
    def build(
        cls, section: TaskSection, workload: WorkloadSection, model_path: Path, seed: int = 0
    ) -> Task:
        """Read, split and encode the data for the model at `model_path`.

        Raises:
            DataError: if the data is missing, malformed or too small.
        """
        ...

    def fingerprint(self, split: Split) -> str:
        """Content key of a split as the model sees it: encoded inputs and labels."""
        ...

    def batches(
        self,
        split: Split,
        batch: int,
        *,
        seed: int | None = None,
        trim: bool = True,
        index: bool = False,
        limit: int | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """One pass over a split: the model's inputs and `labels`, the last batch may be smaller.

        Without a seed the order is that of the split. With one it is shuffled, text of similar
        length together. `trim` cuts a text batch to its longest real length. `index` adds the
        examples' positions in the split, int64 `(B,)`, to look up what was stored per example.
        `limit` takes only the first so many examples of the split.
        """
        ...

    def processor_json(self) -> dict[str, Any] | None:
        """How images become inputs, as a transformers `preprocessor_config.json`; else `None`."""
        ...

    def tokens(self, batch: Mapping[str, torch.Tensor]) -> int:
        """Real tokens (padding excluded; patches for images) in a batch."""
        ...

    def logits(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the model: `(B, C)`, or `(B, T, V)` for language modelling."""
        ...

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats of what has a label, a scalar; 0 if nothing has."""
        ...

    def aggregate(self, per_example: Array) -> float:
        """`Quality.value` of a (re)sample of `Quality.per_example`."""
        ...

    def score(self, logits: Array, split: Split) -> Quality:
        """The metric of logits for a whole split, in its order.

        Raises:
            InternalError: if the logits are not finite or have another shape.
        """
        ...

    def evaluate(
        self,
        run: Run,
        split: Split,
        *,
        batch: int | None = None,
        teacher: Array | Run | None = None,
    ) -> Evaluation:
        """Evaluate an artifact on batches of one fixed shape (the workload's unless given).

        The last batch is filled by repeating its last example, and cut. `teacher` is the split's
        teacher logits in order (an array or a memory map) or a callable like `run`; both sides are
        streamed, so `(N, T, V)` is never held.

        Raises:
            InternalError: if the logits are not finite or have another shape.
        """
        ...

    def example_inputs(self, batch: int, sequence: int) -> dict[str, torch.Tensor]:
        """Real inputs of the given shape, for export. `sequence` is ignored by images."""
        ...
