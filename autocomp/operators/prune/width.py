"""Width: keep part of a feed-forward sublayer's inner channels; the down projection makes up.

Channels are chosen by what removing them costs at the down projection once its remaining columns
have been re-fitted (optimal brain surgeon on its input Gram matrix), greedily.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autocomp.core.candidate import Step
from autocomp.core.errors import UserError
from autocomp.core.unit import SiteFormat, Unit, resized
from autocomp.operators.protocol import Need, Rule, Stage, UnitState, UnitStats
from autocomp.operators.prune.choices import kept_counts


class Width:
    """Keep `keep` inner channels; multiples of 32 (of 8 below a width of 64)."""

    name = "width"
    summary = "Keep the feed-forward channels that matter; refit the down projection."
    paper = "Kurtic et al., 2023, ZipLM, arXiv:2302.04089"
    choices = "structure.width: fractions of the inner width kept"
    stage: Stage = "structure"
    version = 1
    speeds_up: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    shrinks: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    saves_memory: tuple[str, ...] = ()

    def options(self, unit: Unit, rule: Rule) -> Sequence[Step | None]:
        """One step per distinct width; `None` where all of it is kept.

        Raises:
            UserError: if the unit has no inner width (and the rule gives it no `heads` either).
        """
        if "width" not in rule.structure:
            return []
        if unit.width is None:
            if unit.kind == "attention" and "heads" in rule.structure:
                return []
            hint = "write heads: [...] for it" if unit.kind == "attention" else "leave it out"
            raise UserError(
                f"width at {unit.name}: a unit of kind {unit.kind} has no inner width; {hint}, or "
                f"match layers.*.ffn only"
            )
        step = 32 if unit.width >= 64 else 8 if unit.width >= 8 else 1
        counts = kept_counts(
            rule.structure["width"], unit.width, step=step, operator="width", unit=unit.name
        )
        return [None if count is None else Step.of("width", keep=count) for count in counts]

    def formats(
        self, unit: Unit, formats: Mapping[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        """Up (and gate) lose rows, down loses columns."""
        assert unit.width is not None
        result = dict(formats)
        for site in unit.sites:
            if site.role in ("up", "gate"):
                # One linear may hold gate and up together: rows are a multiple of the width.
                rows = site.rows // unit.width * step["keep"]
                result[site.name] = resized(formats[site.name], rows=rows)
            elif site.role == "down":
                result[site.name] = resized(formats[site.name], columns=step["keep"])
        return result

    def needs(self, step: Step) -> frozenset[Need]:
        """Of the down projection's inputs."""
        return frozenset({"gram"})

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Choose channels on the down projection's Gram matrix, cut, compensate."""
        from autocomp.operators.prune.structured import keep_groups

        rows = {site.name: 1 for site in unit.sites if site.role in ("up", "gate")}
        down = next(site.name for site in unit.sites if site.role == "down")
        return keep_groups(state, down, group=1, keep=step["keep"], rows=rows, stats=stats)


OPERATOR = Width()
