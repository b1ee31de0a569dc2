"""Options and candidates: what is done to each unit; canonical, hashable, readable. No torch.

An *option* is an ordered tuple of *steps*, each an operator's name with its arguments; the empty
option leaves the unit dense. A *candidate* maps every unit to an option and carries the
distillation settings of a trial and, where the spec leaves a choice, the runtime it is for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

from autocomp.core.errors import UserError
from autocomp.core.hashing import content_key

Scalar = str | int | float | bool
Runtime = str | None
"""A runtime's name (`openvino`); `None` in a study whose spec leaves no choice."""


@dataclass(frozen=True, order=True)
class Step:
    """One operator applied with `args` (name, value) pairs, sorted by name."""

    operator: str
    args: tuple[tuple[str, Scalar], ...] = ()

    @classmethod
    def of(cls, operator: str, /, **args: Scalar) -> Step:
        """`Step.of("heads", keep=6)`."""
        return cls(operator, tuple(sorted(args.items())))

    def __getitem__(self, name: str) -> Any:
        for key, value in self.args:
            if key == name:
                return value
        raise KeyError(name)

    def label(self) -> str:
        """Short text for tables: `heads keep=6`."""
        return " ".join([self.operator, *(f"{key}={value}" for key, value in self.args)])


@dataclass(frozen=True, order=True)
class Option:
    """The steps done to one unit, in the order they are applied. `Option()` is dense."""

    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        names = [step.operator for step in self.steps]
        if len(names) != len(set(names)):
            raise ValueError(f"an operator appears twice in an option: {', '.join(names)}")

    @property
    def dense(self) -> bool:
        """Whether nothing is done."""
        return not self.steps

    def step(self, operator: str) -> Step | None:
        """The step of this operator, or `None`."""
        return next((step for step in self.steps if step.operator == operator), None)

    def to_json(self) -> dict[str, dict[str, Scalar]]:
        """`{"heads": {"keep": 6}, "gptq": {"weights": 4}}`; `{}` is dense."""
        return {step.operator: dict(step.args) for step in self.steps}

    @classmethod
    def from_json(cls, data: Mapping[str, Mapping[str, Scalar]]) -> Option:
        """Inverse of `to_json`; the mapping's order is the order of the steps."""
        return cls(tuple(Step.of(name, **args) for name, args in data.items()))

    @cached_property
    def key(self) -> str:
        """Content hash; the order of the steps counts."""
        return content_key([[step.operator, dict(step.args)] for step in self.steps])

    def label(self) -> str:
        """Short text for tables."""
        return " + ".join(step.label() for step in self.steps) or "dense"


@dataclass(frozen=True)
class Distillation:
    """Distillation settings of a trial. `tokens == 0` means no training.

    Attributes:
        tokens: real (unpadded) tokens seen.
        lr: AdamW's peak rate.
        temperature: softens teacher and student (Hinton et al., 2015).
        loss: names of losses, joined by `+`; see `autocomp ls losses`.
        weight: of every loss behind the first.
        schedule: how the learning rate falls after warming up: `cosine`, `linear`, `constant`.
        layers: of losses that compare layers: `each`, or the `last` alone.
        top_k: logits of the teacher that the loss `top_k` compares one by one.
        on_policy: share of the batches that the student samples itself, in [0, 1].
    """

    tokens: int = 0
    lr: float = 1e-4
    temperature: float = 2.0
    loss: str = "logits"
    weight: float = 1.0
    schedule: str = "cosine"
    layers: str = "each"
    top_k: int = 64
    on_policy: float = 0.0

    @property
    def losses(self) -> tuple[str, ...]:
        """The names in `loss`."""
        return tuple(self.loss.split("+"))

    def to_json(self) -> dict[str, Any]:
        """Plain mapping, so that equal trials hash equal.

        `tokens` alone when untrained; what came after the first four is left out at its default.
        """
        if self.tokens == 0:
            return {"tokens": 0}
        first = {
            "tokens": self.tokens,
            "lr": self.lr,
            "temperature": self.temperature,
            "loss": self.loss,
        }
        more = ("weight", "schedule", "layers", "top_k", "on_policy")
        plain = Distillation()
        return first | {
            name: getattr(self, name)
            for name in more
            if getattr(self, name) != getattr(plain, name)
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Distillation:
        """Inverse of `to_json`."""
        return cls(**data)


@dataclass(frozen=True)
class Candidate:
    """Unit name → option, in model order, with the distillation settings.

    `runtime` is what the model is lowered to; `None` where the spec leaves no choice.
    """

    options: tuple[tuple[str, Option], ...]
    distillation: Distillation = field(default_factory=Distillation)
    runtime: Runtime = None

    @classmethod
    def of(
        cls,
        options: Mapping[str, Option],
        distillation: Distillation | None = None,
        runtime: Runtime = None,
    ) -> Candidate:
        """From a mapping in model order."""
        return cls(tuple(options.items()), distillation or Distillation(), runtime)

    def __getitem__(self, unit: str) -> Option:
        return self.by_unit[unit]

    def __iter__(self) -> Iterator[tuple[str, Option]]:
        return iter(self.options)

    @cached_property
    def by_unit(self) -> dict[str, Option]:
        """The options as a dictionary."""
        return dict(self.options)

    @cached_property
    def key(self) -> str:
        """Content hash of options and distillation settings, and of the runtime if there is one."""
        parts: list[Any] = [self._option_keys, self.distillation.to_json()]
        return content_key(parts if self.runtime is None else [*parts, self.runtime])

    @cached_property
    def stitch_key(self) -> str:
        """Content hash of the options alone: equal for candidates that stitch to the same model."""
        return content_key(self._option_keys)

    @property
    def _option_keys(self) -> dict[str, str]:
        return {unit: option.key for unit, option in self.options}

    def to_json(self) -> dict[str, Any]:
        """`{"units": {unit: option}, "distillation": {...}}`, and `"runtime"` if there is one."""
        data: dict[str, Any] = {
            "units": {unit: option.to_json() for unit, option in self.options},
            "distillation": self.distillation.to_json(),
        }
        return data if self.runtime is None else {**data, "runtime": self.runtime}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Candidate:
        """Inverse of `to_json`."""
        options = {unit: Option.from_json(option) for unit, option in data["units"].items()}
        distillation = Distillation.from_json(data.get("distillation", {}))
        return cls.of(options, distillation, data.get("runtime"))

    def to_yaml(self) -> str:
        """A line per unit: `layers.0.attention: {heads: {keep: 6}, gptq: {weights: 4}}`."""
        lines = ["units:" if self.options else "units: {}"]
        lines += [f"  {unit}: {_flow(option.to_json())}" for unit, option in self.options]
        lines.append(f"distillation: {_flow(self.distillation.to_json())}")
        if self.runtime is not None:
            lines.append(f"runtime: {self.runtime}")
        return "\n".join([*lines, ""])

    @classmethod
    def from_yaml(cls, text: str) -> Candidate:
        """Inverse of `to_yaml`.

        Raises:
            UserError: if the text is not a candidate.
        """
        try:
            return cls.from_json(yaml.safe_load(text))
        except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"not a candidate ({error}). Expected 'units:', a mapping of unit names to "
                f"{{operator: {{argument: value}}}}, and optionally 'distillation:' and 'runtime:'"
            ) from error


def _flow(data: Mapping[str, Any]) -> str:
    """`data` as one line of YAML."""
    return yaml.safe_dump(
        data, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True
    ).strip()
