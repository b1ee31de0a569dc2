"""The schema of a spec file. Unknown keys are errors; every default is written here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from autocomp.core.budget import RelativeBudget
from autocomp.core.errors import UserError
from autocomp.core.hashing import content_key
from autocomp.core.metric import Floor, parse_floor
from autocomp.core.quantities import Dimension, parse_limit
from autocomp.spec.section import Section
from autocomp.spec.space import RuleSection
from autocomp.spec.task import TaskSection

AUTO = "auto"
"""As `target.runtime`: every installed runtime of the device."""


def _written(parse: Callable[[Any], object]) -> Any:
    """What `parse` can read, kept as it is written."""

    def check(value: Any) -> Any:
        if value is None:
            return None
        try:
            parse(value)
        except UserError as error:
            raise ValueError(str(error)) from None
        return value

    return BeforeValidator(check)


def _limit(dimension: Dimension) -> Any:
    return _written(partial(parse_limit, dimension=dimension))


def _floor(written: float | str) -> Floor:
    """Numbers are the loader's business: studies made with one out of range shall still open."""
    return parse_floor(written) if isinstance(written, str) else Floor(written)


class ModelSection(Section):
    """Where the model comes from."""

    source: str = Field(
        description="A hub id, a local directory, or package:NAME/path for a model shipped in an "
        "installed package. Safetensors only."
    )
    revision: str | None = Field(None, description="Hub revision; pins what is downloaded.")
    trust_remote_code: bool = Field(
        False,
        description="Run Python code that comes with the model (auto_map "
        "in its config.json), here and in every worker; its layout must be a known one.",
    )


class WorkloadSection(Section):
    """The shape latency is measured at: one run, or with `prompt` and `generate` one token."""

    batch: int = Field(1, gt=0, description="Examples per run.")
    sequence: int = Field(
        128,
        gt=0,
        description="Tokens per example (text). Of a model that generates, the chunks it is "
        "trained and evaluated on; its latency has nothing to do with it.",
    )
    image: int | None = Field(None, gt=0, description="Image side in pixels (vision).")
    prompt: int | None = Field(
        None,
        gt=0,
        description="Tokens read before the first is generated (language modelling).",
    )
    generate: int | None = Field(
        None,
        gt=0,
        description="Tokens generated after the prompt. Latency is then that of one of them, the "
        "one in the middle, with all before it in the cache; that of the prompt is recorded too.",
    )
    threads: int = Field(1, gt=0, description="Intra-op threads of the runtime.")

    @model_validator(mode="after")
    def _whole(self) -> WorkloadSection:
        if (self.prompt is None) != (self.generate is None):
            given, missing = ("prompt", "generate") if self.prompt else ("generate", "prompt")
            raise ValueError(
                f"{given} needs {missing}: write both, {{prompt: 128, generate: 32}}, to measure "
                f"a generated token, or neither, to measure one run of `sequence` tokens"
            )
        if self.image is not None and self.prompt is not None:
            raise ValueError("images are not generated from a prompt: leave out one of the two")
        return self

    @property
    def decodes(self) -> bool:
        """Whether latency is that of a generated token."""
        return self.generate is not None


class TargetSection(Section):
    """Device, runtime, workload."""

    device: str = Field("cpu", description="What the model runs on.")
    runtime: str | list[str] = Field(
        "onnxruntime",
        description="What runs the model. A list, or auto for every installed runtime of the "
        "device: the search chooses; limits relative to dense refer to the first one.",
    )
    workload: WorkloadSection = WorkloadSection()

    @field_validator("runtime")
    @classmethod
    def _worth_choosing(cls, runtime: str | list[str]) -> str | list[str]:
        if isinstance(runtime, list):
            if len(set(runtime)) < max(len(runtime), 1):
                raise ValueError("needs at least one runtime, each at most once")
            if AUTO in runtime:
                raise ValueError(f"{AUTO} stands alone: runtime: {AUTO}")
        return runtime

    @property
    def chosen(self) -> bool:
        """Whether the search chooses the runtime: then every candidate names its own."""
        return self.runtime == AUTO or not isinstance(self.runtime, str)

    @property
    def label(self) -> str:
        """`onnxruntime-cpu`, `auto-cpu`, `onnxruntime+openvino-cpu`."""
        runtime = self.runtime if isinstance(self.runtime, str) else "+".join(self.runtime)
        return f"{runtime}-{self.device}"

    def on(self, runtime: str | None) -> TargetSection:
        """This target with its runtime chosen; `None` where there is no choice."""
        return self if runtime is None else self.model_copy(update={"runtime": runtime})


class BudgetSection(Section):
    """Hard limits: on costs absolute ("4 ms") or relative to dense ("25%"), on quality a floor."""

    latency: Annotated[str | None, _limit("latency")] = Field(
        None,
        description="Of one run of the workload, or of one token where it generates: 4 ms, "
        "800 us, 25%.",
    )
    size: Annotated[str | None, _limit("size")] = Field(
        None, description="Of the exported model on disk: 12 MB, 8 MiB, 25%."
    )
    peak_memory: Annotated[str | None, _limit("peak_memory")] = Field(
        None, description="Of a process that loads and runs the model: 200 MB, 50%."
    )
    quality: Annotated[float | str | None, _written(_floor)] = Field(
        None,
        description="Floor on quality, optional: an accuracy as a share (0.9), relative to dense "
        "(98%), or of a language model the highest perplexity (perplexity 50). A number, above 0 "
        "and at most 1, is of a language model 1 / perplexity.",
        json_schema_extra={"exclusiveMinimum": 0, "maximum": 1},
    )

    def limits(self) -> RelativeBudget:
        """The parsed limits."""
        return RelativeBudget(
            latency=None if self.latency is None else parse_limit(self.latency, "latency"),
            size=None if self.size is None else parse_limit(self.size, "size"),
            peak_memory=(
                None if self.peak_memory is None else parse_limit(self.peak_memory, "peak_memory")
            ),
            quality=None if self.quality is None else _floor(self.quality),
        )


class FloatRange(Section):
    """A range to search."""

    low: float = Field(description="Smallest value.")
    high: float = Field(description="Largest value.")
    log: bool = Field(False, description="Search on a logarithmic scale.")

    @model_validator(mode="after")
    def _ordered(self) -> FloatRange:
        if not self.low <= self.high:
            raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError("a log range must be above zero")
        return self


def _sum_of_losses(value: Any) -> Any:
    """`logits + task+hidden` → `logits+hidden+task`: the first leads, the order of others is one.

    Which names there are, other rooms know (`spec.names.check_losses`).
    """
    if not isinstance(value, str):
        return value
    first, *others = (name.strip() for name in value.split("+"))
    if not all((first, *others)):
        raise ValueError(f"{value!r} is no sum of losses: write logits, or logits+hidden")
    if len({first, *others}) <= len(others):
        raise ValueError(f"{value!r} names a loss twice")
    return "+".join([first, *sorted(others)])


class DistilSection(Section):
    """Distillation settings: dimensions of the study."""

    loss: list[Annotated[str, BeforeValidator(_sum_of_losses)]] = Field(
        ["logits"],
        min_length=1,
        description="What the student learns: a loss or a sum, logits+hidden. See: autocomp ls "
        "losses.",
    )
    weight: FloatRange | Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = (
        Field([1.0], description="Of every loss behind the first of a sum.")
    )
    temperature: list[Annotated[float, Field(gt=0)]] = Field(
        [1.0, 2.0, 4.0], min_length=1, description="Softens teacher and student."
    )
    layers: list[Literal["each", "last"]] = Field(
        ["each"],
        min_length=1,
        description="Which layers losses that compare layers look at: each, or the last alone.",
    )
    top_k: list[Annotated[int, Field(gt=0)]] = Field(
        [64],
        min_length=1,
        description="Logits of the teacher that the loss top_k compares one by one.",
    )
    on_policy: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0.0],
        min_length=1,
        description="Share of the batches that the student continues itself (language modelling).",
    )
    lr: FloatRange = Field(
        FloatRange(low=1e-4, high=1e-3, log=True), description="Peak learning rate (AdamW)."
    )
    schedule: list[Literal["cosine", "linear", "constant"]] = Field(
        ["cosine"], min_length=1, description="How the learning rate falls after warming up."
    )
    tokens: list[Annotated[int, Field(ge=0)]] = Field(
        [0, 100_000], min_length=1, description="Real (unpadded) tokens seen; 0 is no training."
    )
    batch: int = Field(32, gt=0, description="Examples per step.")

    @field_validator("lr", "weight")
    @classmethod
    def _positive(cls, range: Any) -> Any:
        if isinstance(range, FloatRange) and range.low <= 0:
            raise ValueError(f"low ({range.low}) must be above zero")
        return range


class SearchSection(Section):
    """How long to search."""

    screen: int = Field(1000, ge=0, description="Candidates screened without training.")
    screen_examples: int = Field(
        128, gt=0, description="Examples of the distil split a candidate is screened on."
    )
    trials: int = Field(
        12, ge=0, description="Full trials proposed by the search; 0 runs the baselines alone."
    )
    rungs: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [],
        description="Shares of a trial's distillation tokens, rising. There a trial is looked at, "
        "and goes on only if it is among the best that came so far.",
    )
    keep: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of the trials at a rung that goes on; 1 looks at them and stops none.",
    )
    realise: bool = Field(
        False,
        description="Whether a trial's operators are applied again, unit after unit, on the inputs "
        "that its compressed model truly gives them, before it is distilled. Pays where trials are "
        "trained on few tokens or none.",
    )
    seed: int = Field(0, ge=0, description="Of everything random: splits, proposals, training.")

    @field_validator("rungs")
    @classmethod
    def _rising(cls, rungs: list[float]) -> list[float]:
        if any(later <= earlier for earlier, later in pairwise(rungs)):
            raise ValueError("needs rising shares, as [0.25, 0.5]")
        return rungs


class Spec(Section):
    """A whole spec file."""

    version: Literal[1] = Field(description="Of the spec's format: 1.")
    model: ModelSection
    task: TaskSection
    target: TargetSection = TargetSection()
    budget: BudgetSection
    objectives: list[Literal["quality", "latency", "size", "peak_memory"]] = Field(
        ["quality", "latency", "size"], description="What the front trades against each other."
    )
    space: list[RuleSection] = Field(
        min_length=1,
        description="Rules: which units, and what may be done to them. The last rule that matches "
        "a unit holds; a unit no rule matches stays dense.",
    )
    distill: DistilSection = DistilSection()
    search: SearchSection = SearchSection()

    @field_validator("objectives")
    @classmethod
    def _worth_trading(cls, objectives: list[str]) -> list[str]:
        if len(set(objectives)) != len(objectives):
            raise ValueError("each objective at most once")
        if "quality" not in objectives or len(objectives) < 2:
            raise ValueError("needs quality and at least one of latency, size, peak_memory")
        return objectives

    @property
    def key(self) -> str:
        """Content hash of everything that defines the study (the amount of search does not)."""
        data = self.model_dump(mode="json")
        for name in ("trials", "screen"):
            data["search"].pop(name)
        return content_key(data)
