"""Reading the precision choices of a rule, and the formats they leave. No torch.

A step's arguments: `weights` (bits), `activations` (8, or 32 for float), `group` (columns that
share a scale, 0 for a whole row); `range` (how the range of activations is fixed) where they are
static; `spare` and `spare_weights` where one group of sites keeps more bits than the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

from autocomp.calibrate.stats import Need
from autocomp.core.candidate import Scalar, Step
from autocomp.core.errors import UserError
from autocomp.core.unit import Role, SiteFormat, Unit

WEIGHT_BITS = (8, 4, 3, 2)
RANGES = ("minmax", "percentile", "mse")
CALIBRATION_FREE = ("rtn", "hqq")
"""Methods that need no inputs: all that a table can take."""

SPARED: dict[str, tuple[Role, ...]] = {
    "query+key": ("query", "key"),
    "value": ("value",),
    "output": ("output",),
    "gate+up": ("gate", "up"),
    "up": ("up",),
    "down": ("down",),
    "pooler": ("pooler",),
    "head": ("head",),
}
"""Groups of sites that may keep more bits than the rest of their unit (`bits.per_site`)."""


@dataclass(frozen=True)
class _Activation:
    """8 or 32 bits; `range` says how a static range is found."""

    bits: int = 32
    range: str | None = None

    def args(self) -> dict[str, Scalar]:
        return {"activations": self.bits, **({"range": self.range} if self.range else {})}


def range_needs(step: Step) -> frozenset[Need]:
    """What fixing the range of activations reads, where `step` does that."""
    return frozenset({"range"}) if "range" in dict(step.args) else frozenset()


def bit_steps(
    operator: str, unit: Unit, bits: Mapping[str, Any], *, allowed: tuple[int, ...] = WEIGHT_BITS
) -> list[Step | None]:
    """Steps for every combination of weight and activation bits; `None` for dense weights.

    Dense weights ignore the activation choice (there is no runtime format of float weights and
    integer activations); embeddings have no activations. 8-bit weights have a scale per row, those
    of fewer bits a scale per `group` columns (0: per row); a list offers each.

    Under `per_site`, each number of bits but the highest is also offered with one group of sites
    (see `SPARED`) spared: left at the next higher number. That keeps the product small: as many
    more options as the unit has groups, per pair of neighbouring choices.

    Raises:
        UserError: for bits, a range or a group that are not supported, naming what is.
    """
    weights = _weights(bits.get("weights", ["dense"]), allowed, operator, unit)
    activations = (
        [_Activation()] if unit.kind == "embedding" else _activations(bits, operator, unit)
    )
    groups = _groups(bits.get("group", 32), operator, unit) if set(weights) - {None, 8} else [0]
    spared = _spared(weights, unit) if bits.get("per_site") else {}
    steps: dict[Step | None, None] = {}
    for weight in weights:
        if weight is None:
            steps[None] = None
            continue
        extras: list[dict[str, Scalar]] = [{}, *spared.get(weight, [])]
        for extra, group in product(extras, [0] if weight == 8 else groups):
            for activation in activations:
                args = {"weights": weight, "group": group}
                steps[Step.of(operator, **args, **activation.args(), **extra)] = None
    return list(steps)


def quantised_formats(
    unit: Unit, formats: Mapping[str, SiteFormat], step: Step, *, scaled: Collection[str] = ()
) -> dict[str, SiteFormat]:
    """The formats with the precision of `step`; inputs of the sites in `scaled` are scaled."""
    args = dict(step.args)
    result = {}
    for name, before in formats.items():
        weights = args["weights"]
        if "spare" in args and _role(unit, name) in SPARED[str(args["spare"])]:
            weights = args["spare_weights"]
        result[name] = replace(
            before,
            weight_bits=int(weights),
            group=None if weights == 8 else int(args["group"]) or None,
            activation_bits=32 if before.embedding else int(args["activations"]),
            static="range" in args and not before.embedding,
            scaled=name in scaled,
        )
    return result


def silent_at_tables(operator: str, unit: Unit, bits: Mapping[str, Any]) -> bool:
    """Whether `operator`, which needs inputs, leaves this unit to another method of the rule.

    Raises:
        UserError: at an embedding, if the rule names no method that needs no inputs.
    """
    if unit.kind != "embedding" or not asks_for_bits(bits):
        return False
    method = bits.get("method")
    named = [method] if isinstance(method, str) or method is None else list(method)
    if any(name in named for name in CALIBRATION_FREE):
        return True
    raise UserError(
        f"{operator} at {unit.name}: an embedding has no input to calibrate on. Allowed there: "
        f"{', '.join(CALIBRATION_FREE)}. Write bits: {{method: rtn, weights: [dense, 8, 4]}} in "
        f"its rule"
    )


def reads_unit_input(unit: Unit, name: str) -> bool:
    """Whether the site (or factor) `name` reads what its attention or feed-forward unit reads.

    In a pre-norm block that is the output of a norm.
    """
    return _role(unit, name) in ("query", "key", "value", "gate", "up") and not name.endswith(
        ".second"
    )


def asks_for_bits(bits: Mapping[str, Any]) -> bool:
    """Whether any weight choice is other than dense."""
    weights = bits.get("weights", ["dense"])
    return any(choice != "dense" for choice in weights)


def _role(unit: Unit, name: str) -> Role | None:
    """The role of a site, or of the site that `name` is a factor of."""
    for site in unit.sites:
        if name == site.name or name.startswith(f"{site.name}."):
            return site.role
    return None


def _spared(weights: list[int | None], unit: Unit) -> dict[int, list[dict[str, Scalar]]]:
    """Weight bits → the groups that may be left at the next higher choice."""
    present = {site.role for site in unit.sites}
    groups = [name for name, roles in SPARED.items() if set(roles) <= present]
    if "gate+up" in groups:
        groups.remove("up")
    if len(groups) < 2:
        return {}
    descending = sorted((bits for bits in weights if bits is not None), reverse=True)
    return {
        low: [{"spare": group, "spare_weights": high} for group in groups]
        for high, low in pairwise(descending)
    }


def _listed(choices: Any, what: str, example: str, operator: str, unit: Unit) -> list[Any]:
    if not isinstance(choices, list | tuple) or not choices:
        raise UserError(
            f"{operator} at {unit.name}: bits.{what} must be a list like [dense, {example}], "
            f"not {choices!r}"
        )
    return list(choices)


def _weights(choices: Any, allowed: tuple[int, ...], operator: str, unit: Unit) -> list[int | None]:
    result: dict[int | None, None] = {}
    for choice in _listed(choices, "weights", str(allowed[0]), operator, unit):
        if choice == "dense":
            result[None] = None
        elif choice in allowed and not isinstance(choice, bool):
            result[int(choice)] = None
        else:
            raise UserError(
                f"{operator} at {unit.name}: bits.weights {choice!r} is not supported. Allowed: "
                f"dense, {', '.join(map(str, allowed))}"
            )
    return list(result)


def _activations(bits: Mapping[str, Any], operator: str, unit: Unit) -> list[_Activation]:
    result: dict[_Activation, None] = {}
    for choice in _listed(bits.get("activations", ["dense"]), "activations", "8", operator, unit):
        if choice == "dense":
            result[_Activation()] = None
        elif choice == 8 and not isinstance(choice, bool):
            result[_Activation(8)] = None
        elif choice == "static":
            result[_Activation(8, _range(bits.get("range", "mse"), operator, unit))] = None
        else:
            raise UserError(
                f"{operator} at {unit.name}: bits.activations {choice!r} is not supported. "
                f"Allowed: dense, 8 (range found at run time), static (8 bits, range found at "
                f"calibration)"
            )
    return list(result)


def _range(choice: Any, operator: str, unit: Unit) -> str:
    if choice not in RANGES:
        raise UserError(
            f"{operator} at {unit.name}: bits.range {choice!r} is not supported. Allowed: "
            f"{', '.join(RANGES)}"
        )
    return str(choice)


def _groups(choices: Any, operator: str, unit: Unit) -> list[int]:
    listed = choices if isinstance(choices, list | tuple) and choices else [choices]
    for group in listed:
        known = isinstance(group, int) and not isinstance(group, bool)
        if not known or (group != 0 and (group < 16 or group & (group - 1))):
            raise UserError(
                f"{operator} at {unit.name}: bits.group {group!r} is not supported. Allowed: a "
                f"power of two, 16 or more (32 and 128 are usual), or 0 for a scale per row; or a "
                f"list of these"
            )
    return list(dict.fromkeys(map(int, listed)))
