"""Text classification: one label per text. Tokenised once, cut by length at every batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.models.sources import read_config
from autocomp.spec.schema import WorkloadSection
from autocomp.spec.task import TaskSection
from autocomp.tasks.base import Classification, check_sequence, tiled
from autocomp.tasks.data import align_labels, load_examples
from autocomp.tasks.protocol import NO_LABEL, Array, Encoded, Split
from autocomp.tasks.transfer import transfer_texts

if TYPE_CHECKING:
    import torch


class TextClassification(Classification):
    """Texts padded on the right to `workload.sequence`: `input_ids`, `attention_mask` `(N, T)`."""

    name = "text-classification"
    summary = "one label per text; accuracy"
    input_names: tuple[str, ...] = ("input_ids", "attention_mask")
    dynamic_axes = {  # noqa: RUF012  (class-level constants of the protocol)
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "sequence"},
    }

    @classmethod
    def build(
        cls,
        section: TaskSection,
        workload: WorkloadSection,
        model_path: Path,
        seed: int = 0,
        *,
        tokenizer: Any = None,
        original: Callable[[Array], Array] | None = None,
    ) -> TextClassification:
        """See `Task.build`.

        `tokenizer` reads the texts instead of the model's own; `original` then maps its ids to
        those of the model's.
        """
        config = read_config(model_path)
        check_sequence(workload.sequence, config)
        examples = load_examples(section.data, "text")
        if section.teacher.fit == "none":
            examples = align_labels(examples, config.get("id2label"))
        indices = examples.split(section.data, seed)
        if tokenizer is None:
            from autocomp.models.load import load_tokenizer

            tokenizer = load_tokenizer(model_path)
        unlabelled = transfer_texts(section.data, examples, indices["distil"], seed)

        def encoded(texts: Sequence[str], labels: Array) -> Encoded:
            inputs = encode_texts(tokenizer, texts, workload.sequence)
            if original is not None:
                inputs["input_ids"] = original(inputs["input_ids"])
            return Encoded(inputs, labels)

        splits: dict[Split, Encoded] = {
            name: encoded([examples.contents[i] for i in chosen], examples.labels[chosen])
            for name, chosen in indices.items()
        }
        splits["transfer"] = splits["distil"]
        if unlabelled:
            extra = encoded(unlabelled, np.full(len(unlabelled), NO_LABEL))
            splits["transfer"] = splits["distil"].followed_by(extra)
        return cls(splits, examples.label_names, len(examples.label_names), workload.batch)

    def lengths(self, encoded: Encoded) -> Array:
        """Real tokens of each text, `(N,)`."""
        real: Array = encoded.inputs["attention_mask"].sum(axis=1)
        return real

    def trimmed(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Cut to the longest real length in the batch."""
        longest = max(1, int(inputs["attention_mask"].sum(axis=1).max()))
        return {name: array[:, :longest] for name, array in inputs.items()}

    def tokens(self, batch: Mapping[str, torch.Tensor]) -> int:
        """Real tokens in the batch."""
        return int(batch["attention_mask"].sum())

    def example_inputs(self, batch: int, sequence: int) -> dict[str, torch.Tensor]:
        """Calibration texts, `(batch, sequence)`, cut or repeated along the sequence."""
        encoded = self.splits["calibrate"]
        columns = np.arange(sequence) % encoded.inputs["input_ids"].shape[1]
        return {name: tiled(array[:, columns], batch) for name, array in encoded.inputs.items()}


def encode_texts(tokenizer: Any, texts: Sequence[str], sequence: int) -> dict[str, Array]:
    """Token ids and mask, int64 `(N, sequence)`, padded on the right, longer texts cut.

    The tokenizer's own padding and truncation settings are ignored. Segment ids are left out: a
    single text has none but zeros, which is what models take them for.
    """
    rows = tokenizer(
        list(texts),
        padding=False,
        truncation=True,
        max_length=sequence,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    input_ids = np.full((len(rows), sequence), padding, dtype=np.int64)
    attention_mask = np.zeros((len(rows), sequence), dtype=np.int64)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = row
        attention_mask[i, : len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
