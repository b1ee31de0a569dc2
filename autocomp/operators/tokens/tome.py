"""Token merging: pairs of similar patch tokens become one, by bipartite soft matching on the keys.

As published: tokens at even places look for the most similar token at an odd place (cosine of the
keys, averaged over the heads), the best `r` pairs are merged by an average weighted with the number
of patches each stands for. Left out: proportional attention (adding log size to the attention
scores), which the paper itself drops for models that are trained afterwards; `models/tokens.py` and
`targets/token_nodes.py` carry the merge out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autocomp.core.candidate import Step
from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import SiteFormat, Unit
from autocomp.operators.protocol import Rule, Stage, UnitState, UnitStats
from autocomp.operators.tokens.choices import protected_tokens, ratio_steps


class Tome:
    """Merge floor(ratio · patches) patch tokens behind an attention sublayer."""

    name = "tome"
    summary = "Merge similar patch tokens of an image behind an attention sublayer."
    paper = "Bolya et al., 2022, Token Merging: Your ViT But Faster, arXiv:2210.09461"
    choices = "tokens.method: tome; tokens.ratios: shares of the patches merged, 0 to 0.5"
    stage: Stage = "tokens"
    version = 1
    speeds_up: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    shrinks: tuple[str, ...] = ()

    def options(self, unit: Unit, rule: Rule) -> Sequence[Step | None]:
        """One step per ratio; `None` for 0.

        Raises:
            UserError: where there are no patch tokens to merge, or for a ratio above a half.
        """
        return ratio_steps(self.name, unit, rule, most=0.5)

    def formats(
        self, unit: Unit, formats: Mapping[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        """Unchanged."""
        return dict(formats)

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Unchanged."""
        return dict(state)

    def reduction(self, unit: Unit, step: Step) -> TokenReduction:
        """Merging by `step`'s ratio."""
        return TokenReduction("tome", float(step["ratio"]), protected_tokens(unit))


OPERATOR = Tome()
