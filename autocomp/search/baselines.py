"""The baselines every study contains: dense, uniform bits, uniform width.

A search earns its keep against these, on the same target, by the same measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from autocomp.core.candidate import Candidate, Distillation, Option, Runtime
from autocomp.core.unit import Unit
from autocomp.search.space import Space
from autocomp.study.records import DENSE, TrialKind

Baseline = tuple[str, TrialKind, Candidate]
"""Trial id, kind, candidate."""

_STRUCTURE = ("heads", "width")


def baselines(
    space: Space,
    units: Sequence[Unit],
    distillation: Distillation | None = None,
    runtime: Runtime = None,
    possible: Callable[[str, Option], bool] | None = None,
    suffix: str = "",
) -> list[Baseline]:
    """Dense, `uniform-int8`, `uniform-int4`, and `uniform-width-{fraction}` for each fraction.

    Only what the space offers: a unit without the wanted option stays dense (8 bits where 4 are
    not offered), and a baseline that would equal dense or another baseline is left out.

    Args:
        space: the space.
        units: the units to compress, normally all of `space.units`.
        distillation: settings of the baselines that change structure, untrained by default. Dense
            and uniform bits are untrained: that is what they are to a user.
        runtime: what they are lowered to, where there is a choice.
        possible: (unit name, option) → whether the runtime can carry it out; by default it can.
        suffix: of every id, to tell the baselines of one runtime from those of another.
    """
    names = {unit.name for unit in units}
    dense = Candidate.of({name: Option() for name in space.names}, runtime=runtime)
    found: list[Baseline] = [(f"{DENSE}{suffix}", "dense", dense)]
    offered = {
        name: [o for o in space.options[name] if possible is None or possible(name, o)]
        for name in space.names
    }
    seen = {dense.stitch_key}

    def add(
        id: str,
        choose: Callable[[Unit, Sequence[Option]], Option | None],
        settings: Distillation | None = None,
    ) -> None:
        chosen = {
            unit.name: (choose(unit, offered[unit.name]) if unit.name in names else None)
            or Option()
            for unit in space.units
        }
        candidate = Candidate.of(chosen, settings, runtime)
        if candidate.stitch_key not in seen:
            seen.add(candidate.stitch_key)
            found.append((f"{id}{suffix}", "uniform", candidate))

    add("uniform-int8", lambda unit, options: _bits(options, 8))
    add("uniform-int4", lambda unit, options: _bits(options, 4) or _bits(options, 8))
    for fraction in _fractions(space):
        add(f"uniform-width-{fraction:g}", partial(_width, wanted=fraction), distillation)
    return found


def _bits(options: Sequence[Option], weights: int) -> Option | None:
    """The option of these weight bits alone; 8-bit activations go first."""
    alone = [
        option
        for option in options
        if len(option.steps) == 1 and dict(option.steps[0].args).get("weights") == weights
    ]
    return min(alone, key=lambda o: dict(o.steps[0].args).get("activations") != 8, default=None)


def _kept(unit: Unit, option: Option) -> float | None:
    """The fraction of query heads or of width that an option keeps, dense bits."""
    if len(option.steps) != 1 or option.steps[0].operator not in _STRUCTURE:
        return None
    whole = unit.width if option.steps[0].operator == "width" else unit.heads
    return None if not whole else float(option.steps[0]["keep"]) / whole


def _fractions(space: Space) -> list[float]:
    """Fractions kept somewhere in the space, to the nearest twentieth, largest first."""
    kept = {
        round(fraction * 20) / 20
        for unit in space.units
        for option in space.options[unit.name]
        if (fraction := _kept(unit, option)) is not None
    }
    return sorted((fraction for fraction in kept if 0 < fraction < 1), reverse=True)


def _width(unit: Unit, options: Sequence[Option], wanted: float) -> Option | None:
    """The option that keeps nearest to this fraction, within a sixteenth."""
    near = [
        (abs(fraction - wanted), index)
        for index, option in enumerate(options)
        if (fraction := _kept(unit, option)) is not None and abs(fraction - wanted) <= 1 / 16
    ]
    return options[min(near)[1]] if near else None
