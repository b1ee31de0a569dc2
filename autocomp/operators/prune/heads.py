"""Heads: keep some attention heads; the output projection makes up for the removed ones.

Heads are chosen by what removing them costs at the output projection once its remaining columns
have been re-fitted (optimal brain surgeon on its input Gram matrix), greedily. Under grouped-query
attention whole key-value groups are kept or removed; `keep` counts query heads throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autocomp.core.candidate import Step
from autocomp.core.errors import UserError
from autocomp.core.unit import SiteFormat, Unit, resized
from autocomp.operators.protocol import Need, Rule, Stage, UnitState, UnitStats
from autocomp.operators.prune.choices import kept_counts


class Heads:
    """Keep `keep` attention heads."""

    name = "heads"
    summary = "Keep the attention heads that matter; refit the output projection."
    paper = "Kurtic et al., 2023, ZipLM, arXiv:2302.04089"
    choices = "structure.heads: fractions of the heads kept, in whole key-value groups"
    stage: Stage = "structure"
    version = 1
    speeds_up: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    shrinks: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    saves_memory: tuple[str, ...] = ()

    def options(self, unit: Unit, rule: Rule) -> Sequence[Step | None]:
        """One step per distinct number of heads; `None` where all are kept.

        Raises:
            UserError: if the unit has no heads (and the rule gives it no `width` either).
        """
        if "heads" not in rule.structure:
            return []
        if unit.heads is None:
            if unit.kind == "ffn" and "width" in rule.structure:
                return []
            hint = "write width: [...] for it" if unit.kind == "ffn" else "leave structure out"
            raise UserError(
                f"heads at {unit.name}: a unit of kind {unit.kind} has no heads; {hint}, or match "
                f"layers.*.attention only"
            )
        counts = kept_counts(
            rule.structure["heads"],
            unit.heads,
            step=_heads_per_group(unit),
            operator="heads",
            unit=unit.name,
        )
        return [None if count is None else Step.of("heads", keep=count) for count in counts]

    def formats(
        self, unit: Unit, formats: Mapping[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        """Query, key and value lose rows, the output projection loses columns."""
        result = dict(formats)
        query_width, key_width = _widths(unit, step["keep"])
        for site in unit.sites:
            if site.role == "query":
                result[site.name] = resized(formats[site.name], rows=query_width)
            elif site.role in ("key", "value"):
                result[site.name] = resized(formats[site.name], rows=key_width)
            elif site.role == "output":
                result[site.name] = resized(formats[site.name], columns=query_width)
        return result

    def needs(self, step: Step) -> frozenset[Need]:
        """Of the output projection's inputs."""
        return frozenset({"gram"})

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Choose heads on the output projection's Gram matrix, cut, compensate."""
        from autocomp.operators.prune.structured import keep_groups

        assert unit.head_dim is not None
        group = _heads_per_group(unit) * unit.head_dim
        rows = {
            site.name: unit.head_dim if site.role in ("key", "value") else group
            for site in unit.sites
            if site.role in ("query", "key", "value")
        }
        output = next(site.name for site in unit.sites if site.role == "output")
        keep = step["keep"] // _heads_per_group(unit)
        return keep_groups(state, output, group=group, keep=keep, rows=rows, stats=stats)


def _heads_per_group(unit: Unit) -> int:
    """Query heads that share one key-value head."""
    assert unit.heads is not None
    return unit.heads // (unit.kv_heads or unit.heads)


def _widths(unit: Unit, keep: int) -> tuple[int, int]:
    """Rows of the query and of the key projection once `keep` query heads remain."""
    assert unit.head_dim is not None
    return keep * unit.head_dim, keep // _heads_per_group(unit) * unit.head_dim


OPERATOR = Heads()
