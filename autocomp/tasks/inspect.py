"""A look at a task's data before it is tokenised: how much there is, which labels. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from autocomp.spec.schema import Spec
from autocomp.tasks.data import held_out_section, load_corpus, load_examples
from autocomp.tasks.transfer import transfer_texts


@dataclass(frozen=True)
class DataSummary:
    """What the data holds.

    Attributes:
        examples: labelled examples after deduplication, or documents of running text.
        label_names: in the order of the logits; empty for language modelling.
        transfer: texts without labels that distillation learns from as well.
        held_out: examples of those, or documents beside them, that models are judged on alone;
            `None` without a test set.
        groups: how many groups of examples are kept together; `None` where none are.
    """

    examples: int
    label_names: tuple[str, ...]
    transfer: int = 0
    held_out: int | None = None
    groups: int | None = None

    @property
    def num_labels(self) -> int | None:
        """Classes, or `None` for language modelling."""
        return len(self.label_names) or None

    def describe(self) -> str:
        """`2127 examples, 5 labels`; what is held out, groups and unlabelled texts if any."""
        more = f", {self.transfer} texts without labels" if self.transfer else ""
        if self.groups is not None:
            more = f" in {self.groups} groups{more}"
        if self.held_out:
            more = f", {self.held_out} held out{more}"
        if not self.label_names:
            return f"{self.examples} documents{more}"
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
        apart = None if data.held_out is None else len(load_corpus(held_out_section(data)))
        return DataSummary(len(load_corpus(data)), (), held_out=apart)
    examples = load_examples(data, content)
    indices = examples.split(data, spec.search.seed)
    further = transfer_texts(data, examples, indices["distil"], spec.search.seed)
    groups = None if examples.groups is None else len(set(examples.groups))
    return DataSummary(len(examples), examples.label_names, len(further), examples.held_out, groups)


def sample_texts(spec: Spec, count: int = 32) -> list[str]:
    """The first labelled texts of the data, to try a shipped tokenizer on; none for other tasks."""
    if _CONTENT.get(spec.task.name) != "text":
        return []
    return [str(text) for text in load_examples(spec.task.data, "text").contents[:count]]
