"""Tokens a task uses, and a task's texts as the tokenizer of a pruned vocabulary reads them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from autocomp.core.errors import UserError
from autocomp.models.layouts import first_position
from autocomp.models.sources import read_config
from autocomp.models.tokenizer_files import FileTokenizer, read_tokenizer, required_ids, unknown_id
from autocomp.models.vocabulary import Vocabulary, chosen_vocabulary
from autocomp.spec.schema import Spec
from autocomp.tasks.protocol import Array, Split, Task
from autocomp.tasks.splits import uncounted

COUNTED: tuple[Split, ...] = ("calibrate", "transfer")
"""Splits whose tokens are looked at: neither that the search is steered by nor the report's."""

KEPT_FROM = 2
"""Examples a token must occur in to be kept. New texts hold about as many unseen tokens as these
hold tokens seen once (Good, 1953): without those, distillation reads spelt out words too, and a
student learns to read them."""


def token_counts(task: Task, rows: int) -> Array:
    """How often each token occurs in the calibrate split and the transfer set, int64 `(rows,)`.

    What candidates are screened on is left out (`splits.uncounted`), so that it reads as new texts
    do. Padding, which attention does not see, counts once.
    """
    return _counted(task, rows, lambda ids, real: ids[real], padding=1)


def example_counts(task: Task, rows: int) -> Array:
    """How many examples of the same splits hold each token, int64 `(rows,)`.

    Padding, which attention does not see, counts as often as it takes to be kept.
    """

    def once(ids: Array, real: Array) -> Array:
        pairs = zip(ids, real, strict=True)
        return np.concatenate([np.unique(example[seen]) for example, seen in pairs])

    return _counted(task, rows, once, padding=KEPT_FROM)


def _counted(
    task: Task, rows: int, counted: Callable[[Array, Array], Array], *, padding: int
) -> Array:
    """Occurrences among what `counted` picks of the ids `(B, T)` and the mask of real tokens."""
    counts = np.zeros(rows, np.int64)
    for split in COUNTED:
        skipped = uncounted(len(task.splits["distil"])) if split == "transfer" else 0
        inputs = {name: array[skipped:] for name, array in task.splits[split].inputs.items()}
        ids = inputs["input_ids"]
        real = inputs.get("attention_mask", np.ones_like(ids)).astype(bool)
        counts += np.bincount(counted(ids, real), minlength=rows)
        counts[ids[~real]] = np.maximum(counts[ids[~real]], padding)
    return counts


def task_vocabulary(spec: Spec, model_path: Path, rows: int) -> Vocabulary:
    """What to keep of a table of `rows` tokens for the spec's task; its texts are encoded for it.

    Without torch or transformers: `check` needs it.

    Raises:
        UserError: for a task that is about more than the tokens it was shown.
        ModelError: for a tokenizer that cannot be pruned.
    """
    if spec.task.name != "text-classification":
        raise UserError(
            f"vocabulary: only text-classification models can lose tokens; {spec.task.name} "
            f"needs each of them as an answer. Leave structure.vocabulary out"
        )
    from autocomp.tasks.text_classification import TextClassification

    tokenizer = read_tokenizer(model_path)
    task = TextClassification.build(
        spec.task,
        spec.target.workload,
        model_path,
        spec.search.seed,
        tokenizer=FileTokenizer(model_path),
    )
    counts = example_counts(task, rows)
    used = np.flatnonzero(counts >= KEPT_FROM).tolist()
    # RoBERTa counts positions from its padding token: that must keep its id, hence all before it.
    required = sorted(
        {*required_ids(tokenizer, used), *range(first_position(read_config(model_path)))}
    )
    return chosen_vocabulary(used, required, unknown_id(tokenizer), rows)


def retokenised(spec: Spec, model_path: Path, vocabulary: Vocabulary) -> Task:
    """The spec's task as a model with a pruned vocabulary is asked in use.

    Texts are read by the tokenizer that is shipped; its ids are given as original ones, as
    everywhere within a study.
    """
    from autocomp.models.load import load_tokenizer_files
    from autocomp.models.tokenizer_files import write_pruned
    from autocomp.tasks.text_classification import TextClassification

    with tempfile.TemporaryDirectory(prefix="autocomp-tokenizer-") as scratch:
        write_pruned(model_path, vocabulary, Path(scratch))
        return TextClassification.build(
            spec.task,
            spec.target.workload,
            model_path,
            spec.search.seed,
            tokenizer=load_tokenizer_files(Path(scratch)),
            original=vocabulary.original,
        )
