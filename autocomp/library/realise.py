"""A candidate made anew from the teacher, unit after unit, each on what truly reaches it.

Library items are built on the inputs that the dense model gives a unit, so that any of them can be
stitched to any other. The units of a chosen candidate are known: here their operators are applied
again in model order, with the statistics of the model compressed so far.

Before, each layer takes back what it can of the errors upstream. Where the dense model gives it
inputs X and the compressed one X̂, it becomes the least-squares solution of W' X̂ ≈ W X,

    W' = W (X X̂ᵀ + λI) (X̂ X̂ᵀ + λI)⁻¹,

drawn towards W by λ; then its operators go by X̂. Without that, operators reproduce layers on inputs
the layers were not made for, and errors add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import nn

from autocomp.calibrate.replay import Batch
from autocomp.calibrate.sequence import Seen, unit_by_unit
from autocomp.calibrate.stats import Need
from autocomp.core.candidate import Candidate, Option
from autocomp.core.gate import NO_GATE, Gate
from autocomp.core.unit import Unit
from autocomp.library.build import load_unit
from autocomp.library.stitch import stitch
from autocomp.library.store import Library
from autocomp.library.training import without_stats
from autocomp.models.surgery import install
from autocomp.operators import (
    apply_option,
    option_formats,
    step_needs,
    token_reduction,
    training_step,
    weight_option,
)
from autocomp.operators.gram import damped, damping_for, inverse
from autocomp.operators.protocol import UnitState

Model = TypeVar("Model", bound=nn.Module)


def realised(candidate: Candidate, units: Sequence[Unit]) -> dict[str, frozenset[Need]]:
    """Unit name → the statistics its operators read, of the units that are made anew.

    Those are the ones whose operators look at inputs; what is trained in the place of attention
    stays as it is in the library. None where tokens are reduced on the way: masks then no longer
    say which hidden states are real.
    """
    found: dict[str, frozenset[Need]] = {}
    for unit in units:
        option = candidate.by_unit.get(unit.name, Option())
        if token_reduction(unit, option) is not None:
            return {}
        stored = weight_option(option)
        if unit.kind == "embedding" or stored.dense or not option_formats(unit, option):
            continue
        needs = step_needs(stored.steps)
        if needs and training_step(option) is None:
            found[unit.name] = frozenset(needs)
    return found


def realise(
    teacher: Model,
    teacher_path: Path,
    units: Sequence[Unit],
    library: Library,
    keys: Mapping[tuple[str, str], str],
    candidate: Candidate,
    batches: Sequence[Batch],
    scratch: Path,
    gate: Gate = NO_GATE,
) -> Model:
    """As `stitch`, but the units of `realised` are compressed in sequence.

    Args:
        teacher_path: where the teacher's weights are read from.
        batches: of the calibration split.
        scratch: for hidden states, while this runs.
        gate: held shared by every piece of work.

    Raises:
        StorageError: if a library item is missing, or the disk refuses.
        ModelError: if activations are not finite.
    """
    needs = realised(candidate, units)
    kept = {name: Option() if name in needs else option for name, option in candidate}
    with gate.working():
        model = stitch(teacher, units, library, keys, Candidate.of(kept))
    for seen in unit_by_unit(model, teacher, units, batches, scratch, needs, gate):
        with gate.working():
            unit = seen.unit
            dense = corrected(load_unit(teacher_path, unit), seen)
            state = apply_option(unit, dense, weight_option(candidate[unit.name]), seen.stats)
            install(model, unit, without_stats(state))
    return model


def corrected(state: UnitState, seen: Seen) -> UnitState:
    """The dense unit, each layer refitted to give on compressed inputs what it gave on dense ones.

    A layer whose Gram matrix was not gathered stays as it is.
    """
    found = dict(state)
    for name, site in state.items():
        stats = seen.stats.get(name)
        if stats is None or not len(stats.gram):
            continue
        damping = damping_for(site.weight.shape[1], stats.count)
        system = damped(stats.gram, damping)
        change = (seen.crossed[name] - stats.gram) @ inverse(system)
        found[name] = replace(site, weight=site.weight + site.weight @ change)
    return found
