"""Filling a cost table: every distinct sublayer timed alone, then a dozen whole candidates.

Pieces (`profile_pieces`) and candidates are lowered from formats with made-up weights, so no torch
model is needed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx

from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import SiteFormat, Unit, UnitFormat, dense_format
from autocomp.targets.cost_table import Choice, CostTable, Entry
from autocomp.targets.mixer_profile import format_seats, takes
from autocomp.targets.profile_pieces import UnitFormats, UnitPieces, cost_key, in_range
from autocomp.targets.runtime import Array, CpuTarget
from autocomp.targets.skeleton_format import dense_formats
from autocomp.targets.timing import ROUNDS
from autocomp.targets.token_nodes import sequence_lengths
from autocomp.targets.token_profile import (
    UnitReductions,
    chosen_reductions,
    reduction_bytes,
    token_costs,
    token_pieces,
)
from autocomp.targets.weights import stand_in_weights

Progress = Callable[[int, int], None]
_WHOLE = {"runs": 48, "rounds": 8, "seconds": 0.4}
_PER_WHOLE = 4
"""Steps of progress that a whole candidate counts for, where a round of all pieces is one."""


def profile(
    target: CpuTarget,
    skeleton: onnx.ModelProto,
    units: Sequence[Unit],
    unit_formats: UnitFormats,
    inputs: Mapping[str, Array],
    *,
    reductions: UnitReductions | None = None,
    candidates: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> CostTable:
    """Measure the table of a model on `target`.

    A generated token is not the sum of its sublayers as a run of many tokens is: what one reads,
    the caches keep for no other. The correction then rests on twice as many whole candidates and
    is still some 10% off (`CostTable.error`); what a search trusts are its measured trials.

    Args:
        unit_formats: the formats of every option of every unit; an empty one is a skipped unit.
        inputs: model inputs at the workload's shape.
        reductions: the options that shorten the sequence; without any, every unit is timed at the
            workload's length alone.
        candidates: whole random candidates measured for the correction; 12 unless given, or 24
            where the workload generates.
    """
    if candidates is None:
        candidates = 24 if target.decodes else 12
    total = ROUNDS + _PER_WHOLE * (candidates + 1)

    def report(done: int, _: int = 0) -> None:
        if progress is not None:
            progress(done, total)

    report(0)
    cut = UnitPieces(target, skeleton, units, unit_formats, inputs)
    pieces = cut.lowered()
    lengths, extra = token_pieces(skeleton, units, reductions or {}, inputs, pieces, cut.at_length)
    pieces |= extra
    timings = target.time_pieces(list(pieces.values()), seed=seed, progress=report)
    times = dict(zip(pieces, map(target.to_ms, timings), strict=True))
    keys = {
        unit.name: {
            key: cost_key(unit, formats, target)
            for key, formats in unit_formats[unit.name].items()
            if formats
        }
        for unit in units
    }
    entries = {
        unit.name: {
            key: Entry(
                times[keys[unit.name][key]] if formats else 0.0,
                sum(target.size_bytes(one) for one in formats.values())
                + cut.mixer_bytes(unit, formats)
                + reduction_bytes(extra, reductions, unit.name, key),
                _kernels(formats, target),
            )
            for key, formats in unit_formats[unit.name].items()
        }
        for unit in units
    }
    report(ROUNDS)
    dense = {unit.name: dense_format(unit) for unit in units}
    whole = lower_formats(target, skeleton, units, dense)
    in_units = sum(target.size_bytes(one) for formats in dense.values() for one in formats.values())
    smallest = {
        unit.name: min(unit_formats[unit.name], key=lambda k: entries[unit.name][k].latency_ms)
        for unit in units
    }
    smallest = _realisable(skeleton, units, unit_formats, reductions, smallest)
    measure = partial(
        _measure_choice, target, skeleton, units, unit_formats, inputs=inputs, reductions=reductions
    )
    least = measure(smallest)
    known = sum(entries[unit][key].latency_ms for unit, key in smallest.items())
    report(ROUNDS + _PER_WHOLE)
    table = CostTable(
        device=target.fingerprint(),
        workload=target.describe()["workload"],
        entries=entries,
        base_ms=max(least - known, 0.1 * least),
        rest_bytes=target.lowered_bytes(whole) - in_units,
        ties=_ties(units, unit_formats, dense),
        tokens=token_costs(lengths, keys, reductions, times) if reductions and lengths else None,
    )
    pairs: list[tuple[Choice, float]] = [(smallest, least)]
    rng = random.Random(seed)
    for index in range(candidates):
        choice = random_choice(rng, unit_formats)
        choice = _realisable(skeleton, units, unit_formats, reductions, choice)
        pairs.append((choice, measure(choice)))
        report(ROUNDS + _PER_WHOLE * (2 + index))
    table.fit(pairs)
    return table


@dataclass(frozen=True)
class Accuracy:
    """Predicted against measured latencies of candidates that were not used in the fit.

    Attributes:
        mean_error, worst_error: of |predicted / measured − 1|.
        spearman: rank correlation.
        pairs: (predicted, measured) in ms.
    """

    mean_error: float
    worst_error: float
    spearman: float
    pairs: tuple[tuple[float, float], ...]


def check_table(
    table: CostTable,
    target: CpuTarget,
    skeleton: onnx.ModelProto,
    units: Sequence[Unit],
    unit_formats: UnitFormats,
    inputs: Mapping[str, Array],
    *,
    reductions: UnitReductions | None = None,
    candidates: int = 20,
    seed: int = 1,
) -> Accuracy:
    """Measure random whole candidates and compare them with what the table predicts."""
    rng = random.Random(f"check {seed}")
    pairs = []
    for _ in range(candidates):
        choice = random_choice(rng, unit_formats)
        choice = _realisable(skeleton, units, unit_formats, reductions, choice)
        predicted = table.predict(choice).latency_ms
        assert predicted is not None
        measured = _measure_choice(
            target, skeleton, units, unit_formats, choice, inputs, reductions
        )
        pairs.append((predicted, measured))
    values = np.array(pairs)
    errors = np.abs(values[:, 0] / values[:, 1] - 1)
    ranks = values.argsort(axis=0).argsort(axis=0)
    return Accuracy(
        mean_error=float(errors.mean()),
        worst_error=float(errors.max()),
        spearman=float(np.corrcoef(ranks[:, 0], ranks[:, 1])[0, 1]),
        pairs=tuple((float(a), float(b)) for a, b in pairs),
    )


def random_choice(rng: random.Random, unit_formats: UnitFormats) -> dict[str, str]:
    """A random candidate whose mean cost varies from candidate to candidate.

    Independent draws per unit would all cost about the same; each candidate therefore has its own
    inclination to skip and its own favoured few options per unit.
    """
    lean = rng.random()
    choice = {}
    for unit, options in unit_formats.items():
        skipped = [key for key, formats in options.items() if not formats]
        kept = sorted(
            (key for key, formats in options.items() if formats),
            key=lambda key: sum(
                f.rows * f.columns * min(f.weight_bits, f.activation_bits * 2)
                for f in options[key].values()
            ),
        )
        if skipped and (not kept or rng.random() < 0.6 * lean):
            choice[unit] = rng.choice(skipped)
            continue
        position = min(max(rng.gauss(1.0 - lean, 0.3), 0.0), 1.0)
        choice[unit] = kept[round(position * (len(kept) - 1))]
    return choice


def _realisable(
    skeleton: onnx.ModelProto,
    units: Sequence[Unit],
    unit_formats: UnitFormats,
    reductions: UnitReductions | None,
    choice: Choice,
) -> dict[str, str]:
    """`choice`, with another option where a mixer cannot take the patches that are left to it."""
    found = dict(choice)
    for unit in units:
        shorter = chosen_reductions(reductions or {}, found)
        tokens = sequence_lengths(skeleton.graph.node, shorter).get(unit.name)
        options = unit_formats[unit.name]
        found[unit.name] = next(
            key for key in (found[unit.name], *options) if takes(unit, options[key], tokens)
        )
    return found


def lower_formats(
    target: CpuTarget,
    skeleton: onnx.ModelProto,
    units: Sequence[Unit],
    formats: Mapping[str, UnitFormat],
    reductions: Mapping[str, TokenReduction] | None = None,
) -> onnx.ModelProto:
    """A whole model with made-up weights in these formats; what is in no unit stays dense."""
    sites: dict[str, SiteFormat] = dense_formats(skeleton)
    for unit in units:
        for site in unit.sites:
            sites.pop(site.name, None)
        sites.update(formats[unit.name])
    seats = format_seats(skeleton, units, formats, reductions)
    return target.lower_weights(
        skeleton, stand_in_weights(sites), reductions=reductions, seats=seats
    )


def measure_formats(
    target: CpuTarget,
    skeleton: onnx.ModelProto,
    units: Sequence[Unit],
    formats: Mapping[str, UnitFormat],
    inputs: Mapping[str, Array],
    reductions: Mapping[str, TokenReduction] | None = None,
) -> float:
    """Latency in reference milliseconds of a whole model with made-up weights."""
    lowered = lower_formats(target, skeleton, units, formats, reductions)
    inputs = in_range(inputs, formats)
    return target.to_ms(target.time_graph(lowered, inputs, **_WHOLE))


def _measure_choice(
    target: CpuTarget,
    skeleton: onnx.ModelProto,
    units: Sequence[Unit],
    unit_formats: UnitFormats,
    choice: Choice,
    inputs: Mapping[str, Array],
    reductions: UnitReductions | None = None,
) -> float:
    formats = {unit: unit_formats[unit][key] for unit, key in choice.items()}
    shorter = chosen_reductions(reductions or {}, choice)
    return measure_formats(target, skeleton, units, formats, inputs, shorter)


def _ties(
    units: Sequence[Unit],
    unit_formats: UnitFormats,
    dense: Mapping[str, UnitFormat],
) -> dict[str, tuple[str, str, str]]:
    """Tied units share bytes while both are dense."""
    dense_key = {
        unit.name: next(
            (k for k, formats in unit_formats[unit.name].items() if formats == dense[unit.name]),
            None,
        )
        for unit in units
    }
    ties = {}
    for unit in units:
        owner = unit.tied_to
        if owner is not None and owner in dense_key:
            own_key, owner_key = dense_key[unit.name], dense_key[owner]
            if own_key is not None and owner_key is not None:
                ties[unit.name] = (owner, own_key, owner_key)
    return ties


def _kernels(formats: UnitFormat, target: CpuTarget) -> str:
    """The class of kernels that dominates a unit; empty when skipped."""
    if not formats:
        return ""
    largest = max(formats.values(), key=lambda one: one.rows * one.columns)
    return target.recipes.kernel_class(largest, target.tokens)
