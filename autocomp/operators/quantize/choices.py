"""Reading the precision choices of a rule, and the formats they leave. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from autocomp.core.candidate import Step
from autocomp.core.errors import UserError
from autocomp.core.unit import SiteFormat, Unit

WEIGHT_BITS = (8, 4, 3, 2)
ACTIVATION_BITS = (8,)


def bit_steps(operator: str, unit: Unit, bits: Mapping[str, Any]) -> list[Step | None]:
    """Steps for every combination of weight and activation bits; `None` for dense weights.

    Dense weights ignore the activation choice (there is no runtime format of float weights and
    integer activations); embeddings have no activations. 8-bit weights have a scale per row, those
    of fewer bits a scale per `group` columns (0: per row).

    Raises:
        UserError: for bits or a group that are not supported, naming what is.
    """
    weights = _read(bits.get("weights", ["dense"]), WEIGHT_BITS, "weights", operator, unit)
    activations = (
        [None]
        if unit.kind == "embedding"
        else _read(
            bits.get("activations", ["dense"]), ACTIVATION_BITS, "activations", operator, unit
        )
    )
    steps: dict[Step | None, None] = {}
    for weight in weights:
        if weight is None:
            steps[None] = None
            continue
        group = 0 if weight == 8 else _group(bits.get("group", 32), operator, unit)
        for activation in activations:
            steps[Step.of(operator, weights=weight, activations=activation or 32, group=group)] = (
                None
            )
    return list(steps)


def quantised_formats(formats: Mapping[str, SiteFormat], step: Step) -> dict[str, SiteFormat]:
    """The formats with the precision of `step`."""
    return {
        name: replace(
            before,
            weight_bits=step["weights"],
            group=step["group"] or None,
            activation_bits=step["activations"],
        )
        for name, before in formats.items()
    }


def asks_for_bits(bits: Mapping[str, Any]) -> bool:
    """Whether any weight choice is other than dense."""
    weights = bits.get("weights", ["dense"])
    return any(choice != "dense" for choice in weights)


def _read(
    choices: Any, allowed: tuple[int, ...], what: str, operator: str, unit: Unit
) -> list[int | None]:
    if not isinstance(choices, list | tuple) or not choices:
        raise UserError(
            f"{operator} at {unit.name}: bits.{what} must be a list like [dense, {allowed[0]}], "
            f"not {choices!r}"
        )
    result: dict[int | None, None] = {}
    for choice in choices:
        if choice == "dense":
            result[None] = None
        elif choice in allowed and not isinstance(choice, bool):
            result[int(choice)] = None
        else:
            raise UserError(
                f"{operator} at {unit.name}: bits.{what} {choice!r} is not supported. Allowed: "
                f"dense, {', '.join(map(str, allowed))}"
            )
    return list(result)


def _group(group: Any, operator: str, unit: Unit) -> int:
    known = isinstance(group, int) and not isinstance(group, bool)
    if not known or (group != 0 and (group < 16 or group & (group - 1))):
        raise UserError(
            f"{operator} at {unit.name}: bits.group {group!r} is not supported. Allowed: a power "
            f"of two, 16 or more (32 and 128 are usual), or 0 for a scale per row"
        )
    return int(group)
