"""A look at a task's data before it is tokenised: how much there is, which labels. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from autocomp.spec.schema import Spec
from autocomp.tasks.data import load_corpus, load_examples, split_sizes
from autocomp.tasks.splits import split_indices
from autocomp.tasks.transfer import transfer_texts


@dataclass(frozen=True)
class DataSummary:
    """What the data holds.

    Attributes:
        examples: labelled examples after deduplication, or documents of running text.
        label_names: in the order of the logits; empty for language modelling.
        transfer: texts without labels that distillation learns from as well.
    """

    examples: int
    label_names: tuple[str, ...]
    transfer: int = 0

    @property
    def num_labels(self) -> int | None:
        """Classes, or `None` for language modelling."""
        return len(self.label_names) or None

    def describe(self) -> str:
        """`2127 examples, 5 labels`, and `5000 texts without labels` if there are some."""
        if not self.label_names:
            return f"{self.examples} documents"
        more = f", {self.transfer} texts without labels" if self.transfer else ""
        return f"{self.examples} examples, {len(self.label_names)} labels{more}"


_CONTENT: dict[str, Literal["text", "image"]] = {
    "text-classification": "text",
    "image-classification": "image",
}


def inspect_data(spec: Spec) -> DataSummary:
    """Read the data and draw its splits.

    Raises:
        DataError: for data that is missing, malformed or too small for the splits asked for.
    """
    data = spec.task.data
    content = _CONTENT.get(spec.task.name)
    if content is None:
        return DataSummary(len(load_corpus(data)), ())
    examples = load_examples(data, content)
    indices = split_indices(
        len(examples),
        split_sizes(data),
        seed=spec.search.seed,
        labels=examples.labels,
        label_names=examples.label_names,
        origin=examples.origin,
    )
    further = transfer_texts(data, examples, indices["distil"], spec.search.seed)
    return DataSummary(len(examples), examples.label_names, len(further))


def sample_texts(spec: Spec, count: int = 32) -> list[str]:
    """The first labelled texts of the data, to try a shipped tokenizer on; none for other tasks."""
    if _CONTENT.get(spec.task.name) != "text":
        return []
    return [str(text) for text in load_examples(spec.task.data, "text").contents[:count]]
