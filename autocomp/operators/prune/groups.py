"""Groups: query heads share fewer keys and values, each the mean of those it stands for.

Adjacent key-value heads are pooled, weights and biases alike: the mean of some heads' keys is what
the mean of their weights gives, rotated or not. Where a model norms its keys, heads are first
brought to one length, as the norm would. What pooling loses is trained back on the unit's own
inputs, as a replacement of attention is: the paper trains the whole model on for that. See
`autocomp.operators.replace.distil`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from autocomp.core.candidate import Step
from autocomp.core.errors import InternalError, UserError
from autocomp.core.unit import SiteFormat, Unit, resized
from autocomp.operators.protocol import (
    Need,
    Rule,
    SiteState,
    SiteStats,
    Stage,
    UnitState,
    UnitStats,
)
from autocomp.operators.prune.choices import read_fractions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from autocomp.calibrate.record import Call
    from autocomp.operators.replace.sublayer import Sublayer

_POOLED = ("key", "value")


class Groups:
    """Pool the key-value heads to `keep`."""

    name = "groups"
    summary = "Share keys and values among more query heads (GQA), trained on the unit's inputs."
    paper = "Ainslie et al., 2023, GQA, arXiv:2305.13245"
    choices = "structure.groups: fractions of the key-value heads kept, as divisors; down to one"
    stage: Stage = "structure"
    version = 1
    trains = True
    speeds_up: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    shrinks: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    saves_memory: tuple[str, ...] = ()

    def options(self, unit: Unit, rule: Rule) -> Sequence[Step | None]:
        """One step per distinct number of key-value heads; `None` where all are kept.

        Raises:
            UserError: if the unit is no attention.
        """
        if "groups" not in rule.structure:
            return []
        if unit.kind != "attention" or unit.kv_heads is None:
            raise UserError(
                f"groups at {unit.name}: a unit of kind {unit.kind} has no keys and values to "
                f"share. Match layers.*.attention only"
            )
        steps: dict[Step | None, None] = {}
        for fraction in read_fractions(rule.structure["groups"], operator="groups", unit=unit.name):
            count = _divisor(unit.kv_heads, fraction)
            steps[None if count == unit.kv_heads else Step.of("groups", keep=count)] = None
        return list(steps)

    def formats(
        self, unit: Unit, formats: Mapping[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        """Key and value lose rows; query and output stay."""
        assert unit.head_dim is not None
        result = dict(formats)
        for site in unit.sites:
            if site.role in _POOLED:
                result[site.name] = resized(formats[site.name], rows=step["keep"] * unit.head_dim)
        return result

    def needs(self, step: Step) -> frozenset[Need]:
        """What attention was called with; where keys are normed, how long they are before that."""
        return frozenset({"recording", "gram"})

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Start from the means, then train on the attention's recorded inputs.

        Raises:
            InternalError: if nothing was recorded of the unit.
        """
        from torch import nn

        from autocomp.calibrate.record import load_recording
        from autocomp.calibrate.stats import RecordedStats
        from autocomp.operators.replace.distil import train

        if not isinstance(stats, RecordedStats):
            raise InternalError(f"{unit.name}: its attention's inputs were not recorded")
        pooled = pool(unit, state, step["keep"], stats)

        def prepare(student: Sublayer, calls: Sequence[Call]) -> nn.Module:
            student.share(pooled)
            layers = student.projections()
            return nn.ModuleList([layers[name] for name in pooled])

        layers, training = train(unit, state, load_recording(stats.recording), prepare)
        formats = self.formats(unit, {name: site.format for name, site in state.items()}, step)
        result: UnitState = {}
        for site in unit.sites:
            weight, bias = layers[site.name]
            result[site.name] = replace(
                state[site.name],
                weight=weight,
                bias=bias,
                format=formats[site.name],
                training=training if site.role == "output" else None,
            )
        return result

    def step_version(self, step: Step) -> int | None:
        """A step names nothing."""
        return None


def pool(
    unit: Unit, state: UnitState, keep: int, stats: UnitStats
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Site → weight `(keep · D, columns)` and bias `(keep · D,)` or `None`, of keys and of values.

    Args:
        stats: read where keys are normed.
    """
    assert unit.head_dim is not None
    found = {}
    for site in unit.sites:
        if site.role not in _POOLED:
            continue
        here = state[site.name]
        columns = here.weight.shape[1]
        weight = here.weight.reshape(-1, unit.head_dim, columns)  # (kv heads, D, columns)
        bias = None if here.bias is None else here.bias.reshape(-1, unit.head_dim)
        if site.role == "key" and not unit.plain_keys:
            length = _lengths(here, stats[site.name], unit.head_dim)
            scale = length.mean() / length
            weight = weight * scale[:, None, None]
            bias = None if bias is None else bias * scale[:, None]
        weight = weight.reshape(keep, -1, unit.head_dim, columns).mean(1).flatten(0, 1)
        if bias is not None:
            bias = bias.reshape(keep, -1, unit.head_dim).mean(1).flatten()
        found[site.name] = weight, bias
    return found


def _lengths(site: SiteState, stats: SiteStats, head_dim: int) -> torch.Tensor:
    """Root mean square length of every head's outputs over the calibration tokens, `(heads,)`."""
    weight = site.weight.double()
    square = (weight @ stats.gram.double() * weight).sum(1) / max(stats.count, 1)  # mean of (Wx)²
    if site.bias is not None:
        bias = site.bias.double()
        square = square + 2 * bias * (weight @ stats.mean.double()) + bias.square()
    lengths = square.clamp_min(0).view(-1, head_dim).sum(1).sqrt()
    return lengths.clamp_min(1e-12).to(site.weight.dtype)


def _divisor(heads: int, fraction: float) -> int:
    """The divisor of `heads` nearest to this fraction of it, the smaller of two."""
    divisors = [count for count in range(1, heads + 1) if heads % count == 0]
    return min(divisors, key=lambda count: (abs(count - fraction * heads), count))


OPERATOR = Groups()
