"""What the three tasks share: batches, streaming evaluation, fingerprints. No torch at import."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.core.errors import InternalError, UserError
from autocomp.core.hashing import content_key
from autocomp.models.layouts import LAYOUTS, ConfigKeys, first_position
from autocomp.tasks.divergence import kl_per_example
from autocomp.tasks.protocol import (
    NO_LABEL,
    SPLITS,
    Array,
    Encoded,
    Evaluation,
    Quality,
    Run,
    Split,
)

if TYPE_CHECKING:
    import torch

_BUCKET_BATCHES = 16
"""Shuffled text is sorted by length within this many batches."""


class LazySplits(Mapping[Split, Encoded]):
    """Splits that are encoded at first use; picklable as long as `encode` is."""

    def __init__(self, encode: Callable[[Split], Encoded]) -> None:
        self._encode = encode
        self._encoded: dict[Split, Encoded] = {}

    def __getitem__(self, split: Split) -> Encoded:
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}. Allowed: {', '.join(SPLITS)}")
        if split not in self._encoded:
            self._encoded[split] = self._encode(split)
        return self._encoded[split]

    def __iter__(self) -> Iterator[Split]:
        return iter(SPLITS)

    def __len__(self) -> int:
        return len(SPLITS)


class EncodedTask(ABC):
    """Base of tasks whose splits are arrays. Subclasses say what a score is and how to trim."""

    name: str
    summary: str
    metric_name: str
    input_names: tuple[str, ...]
    dynamic_axes: dict[str, dict[int, str]]
    keeps_logits = True

    def __init__(
        self,
        splits: Mapping[Split, Encoded],
        label_names: tuple[str, ...],
        num_labels: int | None,
        batch: int,
    ) -> None:
        """`batch` is the workload's, the shape artifacts are evaluated at."""
        self.splits = splits
        self.label_names = label_names
        self.num_labels = num_labels
        self._batch = batch

    @abstractmethod
    def per_example(self, logits: Array, labels: Array) -> Array:
        """Float64 `(n,)`, higher is better, of logits for `n` examples."""

    @abstractmethod
    def aggregate(self, per_example: Array) -> float:
        """See `Task.aggregate`."""

    @abstractmethod
    def metric_value(self, value: float) -> float:
        """The metric in its own sense, given `Quality.value`."""

    @abstractmethod
    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See `Task.loss`."""

    def lengths(self, encoded: Encoded) -> Array | None:
        """Real length of each example where examples differ in length."""
        return None

    def processor_json(self) -> dict[str, Any] | None:
        """See `Task.processor_json`."""
        return None

    def trimmed(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Inputs without columns that are padding in the whole batch."""
        return inputs

    def fingerprint(self, split: Split) -> str:
        """See `Task.fingerprint`."""
        encoded = self.splits[split]
        digest = hashlib.sha256()
        for name in sorted(encoded.inputs):
            digest.update(f"{name}{encoded.inputs[name].shape}".encode())
            digest.update(np.ascontiguousarray(encoded.inputs[name]).data)
        digest.update(np.ascontiguousarray(encoded.labels).data)
        return content_key([self.name, list(self.label_names), digest.hexdigest()])

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
        """See `Task.batches`."""
        import torch

        encoded = self.splits[split]
        lengths = self.lengths(encoded) if trim else None
        count = len(encoded) if limit is None else min(limit, len(encoded))
        for positions in index_batches(count, batch, seed, lengths):
            inputs = {name: array[positions] for name, array in encoded.inputs.items()}
            if trim:
                inputs = self.trimmed(inputs)
            tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
            tensors["labels"] = torch.from_numpy(encoded.labels[positions])
            if index:
                tensors["index"] = torch.from_numpy(positions)
            yield tensors

    def logits(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Task.logits`."""
        output: torch.Tensor = model(**{name: batch[name] for name in self.input_names}).logits
        return output

    def score(self, logits: Array, split: Split) -> Quality:
        """See `Task.score`."""
        labels = self.splits[split].labels
        _check_logits(logits, len(labels), split)
        return self._quality(self.per_example(logits, labels))

    def evaluate(
        self,
        run: Run,
        split: Split,
        *,
        batch: int | None = None,
        teacher: Array | Run | None = None,
    ) -> Evaluation:
        """See `Task.evaluate`."""
        encoded = self.splits[split]
        size, count = batch or self._batch, len(encoded)
        if teacher is not None and not callable(teacher) and len(teacher) != count:
            raise InternalError(f"{split}: {len(teacher)} teacher logits for {count} examples")
        scores, divergences, kept = [], [], []
        for start in range(0, count, size):
            stop = min(start + size, count)
            positions = np.minimum(np.arange(start, start + size), count - 1)
            inputs = {name: array[positions] for name, array in encoded.inputs.items()}
            logits = np.asarray(run(inputs))[: stop - start]
            _check_logits(logits, stop - start, split)
            scores.append(self.per_example(logits, encoded.labels[start:stop]))
            if teacher is not None:
                reference = teacher(inputs) if callable(teacher) else teacher[start:stop]
                divergences.append(kl_per_example(reference[: stop - start], logits))
            if self.keeps_logits:
                kept.append(logits.astype(np.float32))
        kl = np.concatenate(divergences) if divergences else None
        return Evaluation(
            quality=self._quality(np.concatenate(scores)),
            teacher_kl=None if kl is None else float(kl.mean()),
            kl_per_example=kl,
            logits=np.concatenate(kept) if kept else None,
        )

    def _quality(self, per_example: Array) -> Quality:
        value = self.aggregate(per_example)
        return Quality(value, self.metric_name, self.metric_value(value), per_example)


class Classification(EncodedTask):
    """One label an example; the metric is accuracy."""

    metric_name = "accuracy"

    def per_example(self, logits: Array, labels: Array) -> Array:
        """1 where the largest logit is the label's, else 0."""
        right: Array = (logits.argmax(axis=-1) == labels).astype(np.float64)
        return right

    def aggregate(self, per_example: Array) -> float:
        """Accuracy."""
        return float(per_example.mean())

    def metric_value(self, value: float) -> float:
        """Accuracy is its own metric."""
        return value

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of `(B, C)` logits, nats."""
        return cross_entropy(logits, labels)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over what has a label, nats, of logits `(N, C)` and labels `(N,)`; 0 if nothing has."""
    from torch.nn import functional as F

    total = F.cross_entropy(logits.float(), labels, ignore_index=NO_LABEL, reduction="sum")
    return total / (labels != NO_LABEL).sum().clamp(min=1)


def index_batches(
    count: int, batch: int, seed: int | None, lengths: Array | None = None
) -> Iterator[Array]:
    """Positions of one pass, int64 `(batch,)` each, the last may be shorter.

    With a seed the order is random; with lengths too, examples of similar length share a batch.
    """
    order = np.arange(count)
    if seed is not None:
        generator = np.random.default_rng(seed)
        order = generator.permutation(order)
        if lengths is not None:
            span = batch * _BUCKET_BATCHES
            buckets = [order[start : start + span] for start in range(0, count, span)]
            order = np.concatenate([b[np.argsort(lengths[b], kind="stable")] for b in buckets])
    batches: list[Array] = [order[start : start + batch] for start in range(0, count, batch)]
    if seed is not None and lengths is not None:
        batches = [batches[i] for i in generator.permutation(len(batches))]
    return iter(batches)


def model_positions(config: Mapping[str, Any]) -> int | None:
    """Tokens a model has positions for; `None` if its config names no limit."""
    layout = LAYOUTS.get(str(config.get("model_type")))
    keys = ConfigKeys() if layout is None else layout.keys
    positions: int | None = config.get(keys.positions or "max_position_embeddings")
    return None if positions is None else positions - first_position(config)


def check_sequence(sequence: int, config: Mapping[str, Any], *, trained: bool = False) -> None:
    """Refuse more tokens than the model has positions for.

    Args:
        trained: whether all of the model is fitted to the task first: then one whose positions are
            computed, not looked up in a table, learns to go on.

    Raises:
        UserError: naming the limit.
    """
    positions = model_positions(config)
    if positions is None or sequence <= positions:
        return
    layout = LAYOUTS.get(str(config.get("model_type")))
    computed = layout is not None and layout.keys.positions is None
    if computed and trained:
        return
    more = ", or let the model be continued to more: task.teacher: {fit: full}" if computed else ""
    raise UserError(
        f"target.workload.sequence: {sequence} tokens, but the model has {positions} positions. "
        f"Use {positions} or fewer{more}"
    )


def _check_logits(logits: Array, count: int, split: str) -> None:
    if len(logits) != count:
        raise InternalError(f"{split}: {len(logits)} rows of logits for {count} examples")
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits.reshape(count, -1)).all(axis=1)).sum())
        raise InternalError(
            f"{split}: the model's logits are not finite for {bad} of {count} examples of a batch"
        )


def tiled(array: Array, count: int) -> Any:
    """The first `count` rows, repeated from the start where there are fewer, as a tensor."""
    import torch

    return torch.from_numpy(array[np.arange(count) % len(array)])
