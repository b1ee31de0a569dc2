"""What the methods of token reduction have in common: no weight changes, a ratio does. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autocomp.core.candidate import Step
from autocomp.core.tokens import Method, TokenReduction
from autocomp.core.unit import SiteFormat, Unit
from autocomp.operators.protocol import Need, Rule, Stage, UnitState, UnitStats
from autocomp.operators.tokens.choices import protected_tokens, ratio_steps


class TokenReducer:
    """An operator without what it is called and says of itself; `most` is its largest ratio."""

    name: Method
    most: float
    stage: Stage = "tokens"
    speeds_up: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    shrinks: tuple[str, ...] = ()
    saves_memory: tuple[str, ...] = ()

    def options(self, unit: Unit, rule: Rule) -> Sequence[Step | None]:
        """One step per ratio; `None` for 0.

        Raises:
            UserError: where there are no patch tokens, or for a ratio above `most`.
        """
        return ratio_steps(self.name, unit, rule, most=self.most)

    def formats(
        self, unit: Unit, formats: Mapping[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        """Unchanged."""
        return dict(formats)

    def needs(self, step: Step) -> frozenset[Need]:
        """Nothing."""
        return frozenset()

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Unchanged."""
        return dict(state)

    def reduction(self, unit: Unit, step: Step) -> TokenReduction:
        """By `step`'s ratio."""
        return TokenReduction(self.name, float(step["ratio"]), protected_tokens(unit))
