"""Token pruning: keep the patch tokens the class token attends to, drop the others.

The criterion is EViT's: the class token's attention, averaged over the heads, in the sublayer just
passed. The dropped tokens are not fused into one, and the order of those that stay is kept.
`models/tokens.py` and `targets/token_nodes.py` carry it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autocomp.core.candidate import Step
from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import SiteFormat, Unit
from autocomp.operators.protocol import Rule, Stage, UnitState, UnitStats
from autocomp.operators.tokens.choices import protected_tokens, ratio_steps


class TokenPrune:
    """Drop floor(ratio · patches) patch tokens behind an attention sublayer."""

    name = "token_prune"
    summary = "Drop the patch tokens of an image that the class token attends to least."
    paper = "Liang et al., 2022, EViT: Expediting Vision Transformers, arXiv:2202.07800"
    choices = "tokens.method: token_prune; tokens.ratios: shares of the patches dropped, below 1"
    stage: Stage = "tokens"
    version = 1
    speeds_up: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    shrinks: tuple[str, ...] = ()

    def options(self, unit: Unit, rule: Rule) -> Sequence[Step | None]:
        """One step per ratio; `None` for 0.

        Raises:
            UserError: where there are no patch tokens to drop, or for a ratio out of range.
        """
        return ratio_steps(self.name, unit, rule, most=0.95)

    def formats(
        self, unit: Unit, formats: Mapping[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        """Unchanged."""
        return dict(formats)

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Unchanged."""
        return dict(state)

    def reduction(self, unit: Unit, step: Step) -> TokenReduction:
        """Dropping by `step`'s ratio."""
        return TokenReduction("token_prune", float(step["ratio"]), protected_tokens(unit))


OPERATOR = TokenPrune()
