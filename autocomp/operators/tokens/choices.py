"""Reading the token choices of a rule: ratios of the patch tokens, for vision attention. No torch.

A step carries its ratio; how many tokens that is follows from how many arrive at the unit, which
depends on the steps before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from autocomp.core.candidate import Step
from autocomp.core.errors import UserError
from autocomp.core.unit import Unit
from autocomp.operators.protocol import Rule


def ratio_steps(name: str, unit: Unit, rule: Rule, *, most: float) -> list[Step | None]:
    """One step per distinct ratio, in order; `None` for 0. Empty where `name` is not asked for.

    Args:
        most: the largest ratio this method can carry out.

    Raises:
        UserError: at a unit that is no attention of a vision model, or for a ratio out of range.
    """
    if name not in rule.methods("tokens"):
        return []
    if unit.kind != "attention":
        raise UserError(
            f"{name} at {unit.name}: tokens are merged or dropped behind attention sublayers only, "
            f"and this unit is of kind {unit.kind}; match layers.*.attention in a rule of its own"
        )
    if unit.protected_tokens is None:
        raise UserError(
            f"{name} at {unit.name}: only models of images can do with fewer tokens: the output "
            f"has a place for every token of a text; leave tokens out"
        )
    ratios = rule.tokens.get("ratios", [])
    if not isinstance(ratios, Sequence) or isinstance(ratios, str) or not ratios:
        raise UserError(f"{name} at {unit.name}: {ratios!r} is no list of ratios like [0.0, 0.1]")
    steps: dict[Step | None, None] = {}
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= most:
            raise UserError(
                f"{name} at {unit.name}: the ratio must be from 0 to {most:g}, not {ratio!r}"
            )
        steps[Step.of(name, ratio=float(ratio)) if ratio else None] = None
    return list(steps)


def protected_tokens(unit: Unit) -> int:
    """The unit's leading tokens that stay."""
    if unit.protected_tokens is None:
        raise UserError(f"{unit.name}: no tokens can be merged or dropped behind this unit")
    return unit.protected_tokens
