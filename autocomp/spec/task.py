"""What a spec says of its task: the data and its splits, and how the teacher is made."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from autocomp.spec.section import Section

TASKS = ("text-classification", "image-classification", "language-modeling")

Format = Literal["auto", "hub", "csv", "jsonl", "parquet", "npz", "text", "text-folders"]


class TransferSection(Section):
    """Texts without labels, which distillation learns from beside the distil split."""

    examples: int = Field(gt=0, description="How many of them.")
    source: str | None = Field(
        None,
        description="As task.data.source. By default what task.data.lines leaves out of the distil "
        "split's own texts, line by line.",
    )
    format: Format = Field("auto", description="As task.data.format.")
    subset: str | None = Field(None, description="Hub dataset configuration.")
    split: str = Field("train", description="Hub dataset split to read.")
    text: str = Field("text", description="Column (or npz array) with the text.")


class HeldOutSection(Section):
    """Where the search and the report split are drawn from, if not from the data itself."""

    source: str | None = Field(
        None,
        description="As task.data.source. By default the same, for another split of the hub's.",
    )
    format: Format = Field("auto", description="As task.data.format.")
    subset: str | None = Field(None, description="Hub dataset configuration.")
    split: str = Field("test", description="Hub dataset split to read.")


class DataSection(Section):
    """Where the examples come from and how they are split."""

    source: str = Field(
        description="A hub dataset id, a local file or directory, or package:NAME/path."
    )
    format: Format = Field(
        "auto",
        description="auto goes by the file's ending. text-folders: a folder per label, a text "
        "file per example. text: running text for language modelling.",
    )
    subset: str | None = Field(None, description="Hub dataset configuration.")
    split: str = Field("train", description="Hub dataset split to read.")
    text: str = Field("text", description="Column (or npz array) with the text.")
    image: str = Field("image", description="Column (or npz array) with the image.")
    label: str = Field("label", description="Column (or npz array) with the label.")
    lines: int | None = Field(
        None, gt=0, description="Keep only this many first lines of a text (1: the headline)."
    )
    unique: bool = Field(
        True, description="Drop examples whose full text or image was seen before."
    )
    group: str | None = Field(
        None,
        description="Column (or npz array) that says which examples belong together (of one "
        "document, user or patient): all of them are in one split.",
    )
    held_out: HeldOutSection | None = Field(
        None,
        description="A validation or test set: search and report are drawn from it, calibrate and "
        "distil from source.",
    )
    calibrate: int = Field(128, gt=0, description="Examples for activation statistics.")
    distil: int = Field(1000, gt=0, description="Examples for teacher fitting and distillation.")
    search: int = Field(300, gt=0, description="Examples the search is steered by.")
    report: int = Field(500, gt=0, description="Examples the chosen are looked at on, at the end.")
    transfer: TransferSection | None = Field(
        None,
        description="Further texts, without labels, for distillation alone (text-classification).",
    )

    @model_validator(mode="after")
    def _transfer_has_a_source(self) -> DataSection:
        if self.transfer is not None and self.transfer.source is None and self.lines is None:
            raise ValueError(
                "transfer: without lines every text is read whole, so nothing is left of it to "
                "learn from. Name a source of texts: transfer: {source: …, examples: …}"
            )
        return self

    @model_validator(mode="after")
    def _held_out_is_another(self) -> DataSection:
        if self.held_out is not None and self.held_out.source is None:
            same = (self.held_out.subset or self.subset, self.held_out.split)
            if same == (self.subset, self.split):
                raise ValueError(
                    "held_out: this is the data itself. Name another source, or another split of a "
                    "hub dataset: held_out: {source: test.jsonl}, held_out: {split: test}"
                )
        return self


class TeacherSection(Section):
    """How the teacher is made from the source model."""

    fit: Literal["none", "head", "full"] = Field(
        "none",
        description="none: the model is the teacher. head: fit a new head on the distil split. "
        "full: fit head and encoder.",
    )
    epochs: int = Field(4, gt=0, description="Passes over the distil split.")
    lr: float = Field(1e-4, gt=0, description="Peak learning rate (AdamW).")
    batch: int = Field(32, gt=0, description="Examples per step.")


class TaskSection(Section):
    """What the model is for."""

    name: str = Field(description=f"One of {', '.join(TASKS)}, or a registered task.")
    data: DataSection
    teacher: TeacherSection = TeacherSection()

    @model_validator(mode="after")
    def _groups_are_of_examples(self) -> TaskSection:
        if self.data.group is not None and self.name == "language-modeling":
            raise ValueError(
                "data.group: running text has no examples that belong together. To be judged on "
                "other texts, name them: held_out: {source: …}"
            )
        return self

    @model_validator(mode="after")
    def _transfer_is_text(self) -> TaskSection:
        if self.data.transfer is not None and self.name in TASKS[1:]:
            raise ValueError(
                f"data.transfer: texts without labels are for text-classification; {self.name} "
                f"learns from more of its own data: raise data.distil instead"
            )
        return self
