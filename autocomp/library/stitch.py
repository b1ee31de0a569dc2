"""Stitching: a whole model from the teacher and library items, in milliseconds, untrained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from autocomp.core.candidate import Candidate, Option
from autocomp.core.errors import StorageError
from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import Unit
from autocomp.library.store import Library
from autocomp.models.surgery import copy_for_surgery, install
from autocomp.models.tokens import install_tokens
from autocomp.operators import option_formats, token_reduction, weight_option
from autocomp.operators.protocol import UnitState

Model = TypeVar("Model", bound=nn.Module)


def stitch(
    teacher: Model,
    units: Sequence[Unit],
    library: Library,
    keys: Mapping[tuple[str, str], str],
    candidate: Candidate,
    *,
    rebuild: Callable[[Unit, Option], None] | None = None,
) -> Model:
    """The teacher with every unit in the state its option asks for.

    The model shares storage with the teacher and with what the library keeps in memory: take a deep
    copy before training it.

    Args:
        keys: (unit name, option key) → item key, from `plan_build`.
        rebuild: called for an item that is missing or damaged; must store it again.

    Raises:
        StorageError: if an item is missing or damaged, and no `rebuild` helped.
    """
    model = copy_for_surgery(teacher)
    reductions: dict[str, TokenReduction] = {}
    for unit in units:
        option = candidate.by_unit.get(unit.name, Option())
        if not weight_option(option).dense:
            install(model, unit, _state(unit, option, library, keys, rebuild))
        reduction = token_reduction(unit, option)
        if reduction is not None:
            reductions[unit.name] = reduction
    if reductions:
        install_tokens(model, units, reductions)
    return model


def _state(
    unit: Unit,
    option: Option,
    library: Library,
    keys: Mapping[tuple[str, str], str],
    rebuild: Callable[[Unit, Option], None] | None,
) -> UnitState:
    if not option_formats(unit, option):
        return {}
    key = keys.get((unit.name, option.key))
    state = None if key is None else library.get(key)
    if state is None and key is not None and rebuild is not None:
        rebuild(unit, option)
        state = library.get(key)
    if state is None:
        raise StorageError(
            f"the library {library.root} has no item for {unit.name} under '{option.label()}'. "
            f"Start the same command again: missing items are built first"
        )
    return state
