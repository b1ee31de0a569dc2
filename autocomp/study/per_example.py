"""What a trial scored on every example of a split, kept so that trials can be compared in pairs.

One small file for each trial and split, whole or absent; it is written before the ledger is told of
the trial. Studies of earlier versions have none, and what needs them is left out there.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from autocomp.core.files import write_atomic
from autocomp.study.paths import StudyPaths

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExampleScores:
    """Scores of one trial on one split.

    Attributes:
        values: float64 `(N,)` in the split's order, higher is better: `Quality.per_example`.
        examples: digest of the examples' labels (of their tokens, for a language model). Scores
            pair up where it is equal.
    """

    values: npt.NDArray[np.float64] = field(repr=False)
    examples: str


def save_scores(path: Path, values: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> None:
    """Write the scores `(N,)` of examples with these labels, `(N,)` or `(N, T)`, atomically.

    Raises:
        StorageError: if the disk is full or refuses.
    """
    from safetensors.numpy import save_file

    digest = hashlib.sha256(f"{labels.shape}".encode())
    digest.update(np.ascontiguousarray(labels, dtype=np.int64).data)
    tensors = {"scores": np.ascontiguousarray(values, dtype=np.float64)}
    metadata = {"examples": digest.hexdigest()[:16]}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_scores(path: Path) -> ExampleScores | None:
    """What `save_scores` wrote; `None` where there is none, or (with a warning) a damaged file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            scores = ExampleScores(file.get_tensor("scores"), file.metadata()["examples"])
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s): no interval is given for this trial", path, error)
        return None
    return scores if scores.values.ndim == 1 and len(scores.values) else None


def scores_of(paths: StudyPaths, trials: Iterable[str], split: str) -> dict[str, ExampleScores]:
    """Trial → its scores on a split, of those that have any."""
    found = {trial: load_scores(paths.per_example(trial, split)) for trial in trials}
    return {trial: scores for trial, scores in found.items() if scores is not None}
