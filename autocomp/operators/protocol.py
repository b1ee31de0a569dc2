"""What an operator is: the protocol, and the state it works on.

An operator lives in one file, is registered by name, and does four things: it says which steps it
offers for a unit (`options`), what a step leaves there in shapes and precision (`formats`), which
statistics carrying it out reads (`needs`), and it carries it out on weights (`apply`). All but the
last are torch-free, so that checking a spec and estimating costs need no torch; a module that
defines an operator imports torch inside `apply` only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from autocomp.calibrate.stats import Need, SiteStats, UnitStats
from autocomp.core.candidate import Step
from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import SiteFormat, Unit

if TYPE_CHECKING:
    import torch

    from autocomp.models.mixers.protocol import MixerShape

__all__ = [
    "STAGES",
    "LocalTraining",
    "MixerState",
    "Need",
    "Operator",
    "Rule",
    "SiteState",
    "SiteStats",
    "Stage",
    "TokenOperator",
    "TrainingOperator",
    "UnitState",
    "UnitStats",
    "trained_stats",
    "training_of",
]

Stage = Literal["structure", "tokens", "sparsity", "bits", "cache"]
STAGES: tuple[Stage, ...] = ("structure", "tokens", "sparsity", "bits", "cache")
"""Steps of an option are applied in this order. Those of `tokens` change no weight."""


@dataclass(frozen=True)
class MixerState:
    """What makes the input of attention's output projection, in place of softmax.

    Attributes:
        name: of the mixer, as in `MIXERS`.
        shape: what it was made for.
        parameters: its `state_dict`; shapes are the mixer's own.
    """

    name: str
    shape: MixerShape
    parameters: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class LocalTraining:
    """That the attention of a unit was trained by itself, on what it was called with.

    Attributes:
        report: errors before and after, rates, loss curve. Plain values.
        stats: of what the output projection reads since; for operators of later stages, `None`
            once nothing is to be built on it.
    """

    report: Mapping[str, Any]
    stats: SiteStats | None = None


@dataclass
class SiteState:
    """The weights at one site while operators work on it.

    Attributes:
        weight: float32 `(rows, columns)`; equals the dequantised codes once quantised.
        bias: float32 `(rows,)` or `None`.
        format: shape and precision of what is there now.
        codes: int8 `(rows, columns)`, symmetric, once quantised; `weight == codes * scale`.
        scales: float32 `(rows, groups)`, `groups == ceil(columns / group)`, once quantised.
        kept_columns: indices of the original input columns that remain; `None` is all of them.
        mask: bool `(rows, columns)`, true where a weight may be other than zero; `None` is all.
        origin: float32 `(rows, columns)`, the weight before sparsity: what bits are solved from.
        input_scale: float32 `(columns,)`, what inputs are multiplied by; `weight` is already
            divided by it.
        input_range: smallest and largest input, where activations are static.
        kept_rows: of a table, int64 `(rows,)`, ascending: the original rows that remain.
        row_of: with it, int64 `(original rows,)`: which row stands for each original one.
        mixer: at the output of attention: what replaces its softmax. Later steps keep it.
        training: there too: how the unit was trained, where it was. Later steps keep it.
        output_scale: float32 `(rows,)`, in steps of which outputs are cached, at `cache_bits` 8.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    format: SiteFormat
    codes: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    kept_columns: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    origin: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    input_range: tuple[float, float] | None = None
    kept_rows: torch.Tensor | None = None
    row_of: torch.Tensor | None = None
    mixer: MixerState | None = None
    training: LocalTraining | None = None
    output_scale: torch.Tensor | None = None

    def on_plain_inputs(self) -> torch.Tensor:
        """The weight as it acts on inputs that are not scaled, `(rows, columns)`."""
        return self.weight if self.input_scale is None else self.weight * self.input_scale


UnitState = dict[str, SiteState]
"""Site name → state. An empty dictionary is a skipped unit."""


def training_of(state: UnitState) -> LocalTraining | None:
    """How the unit was trained by itself, if it was."""
    return next((site.training for site in state.values() if site.training is not None), None)


def trained_stats(state: UnitState) -> dict[str, SiteStats]:
    """Site → statistics of what it reads since the unit was trained, where they are known."""
    return {
        name: site.training.stats
        for name, site in state.items()
        if site.training is not None and site.training.stats is not None
    }


@dataclass(frozen=True)
class Rule:
    """The part of a spec's space rule that operators read; one entry per axis.

    `structure`: operator name → its choices as written (`{"heads": [1.0, 0.5], "skip": True}`).
    `sparsity`: `{"method": "sparsegpt", "levels": [0.0, 0.5, "2:4"]}`.
    `bits`: `{"method": "gptq", "weights": ["dense", 8], "activations": ["dense", 8], "group": 32}`;
    also `cache`, `range`, `migration`, `per_site`.
    `tokens`: `{"method": "tome", "ratios": [0.0, 0.1]}`; empty where none is asked for.
    """

    structure: Mapping[str, Any] = field(default_factory=dict)
    bits: Mapping[str, Any] = field(default_factory=dict)
    sparsity: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, Any] = field(default_factory=dict)

    def methods(self, stage: Stage) -> list[str]:
        """Names of the operators asked for in `stage`, in the order written."""
        if stage == "structure":
            return list(self.structure)
        if stage == "cache":
            return ["kv_cache"] if set(self.bits.get("cache", [])) - {"dense"} else []
        named = getattr(self, stage).get("method", [])
        return [named] if isinstance(named, str) else list(named)


class Operator(Protocol):
    """A compression method. Attributes are class-level constants.

    Attributes:
        name: as written in a spec and listed by `autocomp ls operators`.
        summary: one sentence.
        paper: author, year, title or arXiv number; empty when there is none.
        choices: the entries of a spec's rule it reads, for `autocomp ls operators`.
        stage: when it is applied; see `STAGES`.
        version: raised when the weights it produces change, so that stored items are rebuilt.
        speeds_up, shrinks: names of the targets that turn it into speed, into bytes on disk.
        saves_memory: names of those on which it lowers the peak while running beyond what fewer
            bytes on disk do.
    """

    name: str
    summary: str
    paper: str
    choices: str
    stage: Stage
    version: int
    speeds_up: tuple[str, ...]
    shrinks: tuple[str, ...]
    saves_memory: tuple[str, ...]

    def options(self, unit: Unit, rule: Rule) -> Sequence[Step | None]:
        """The steps this rule asks of this operator at `unit`; `None` stands for leaving it out.

        Empty when the operator does not apply there. Deterministic order, no duplicates.

        Raises:
            UserError: for a choice that makes no sense, naming what is allowed.
        """
        ...

    def formats(
        self, unit: Unit, formats: Mapping[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        """What `step` makes of `formats`; empty when the unit is skipped."""
        ...

    def needs(self, step: Step) -> frozenset[Need]:
        """What of the statistics `apply` reads: nothing else is gathered for it.

        `rows` are those of tables, `gram` and `range` those of linear layers; the operators of one
        option share what they need.
        """
        ...

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Carry `step` out. Does not modify `state`. Same input, same result, bit for bit."""
        ...


class TrainingOperator(Operator, Protocol):
    """An operator that trains, on what the unit's attention was called with.

    It has an attribute `trains`, and `apply` is given `RecordedStats`. Its steps come first in an
    option; what one leaves is stored by itself, so that nothing is trained twice.
    """

    trains: bool

    def step_version(self, step: Step) -> int | None:
        """The version of what `step` names, beside that of the operator; `None` if it does not."""
        ...


class TokenOperator(Operator, Protocol):
    """An operator of the stage `tokens`: what it does is said by a `TokenReduction`.

    Its `formats` and `apply` change nothing; model and target carry the reduction out.
    """

    def reduction(self, unit: Unit, step: Step) -> TokenReduction:
        """What `step` does to the sequence behind `unit`."""
        ...
