"""Filling a cost table: every distinct sublayer timed alone, then a dozen whole candidates.

A unit's piece is cut from the skeleton, from what feeds its first sites to the output of its last;
what else it reads (mask, rotary tables) is recorded once from a run of the dense graph. Pieces and
candidates are lowered from formats with made-up weights, so no torch model is needed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
from onnx import helper

from autocomp.core.factors import site_of
from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import SiteFormat, Unit, UnitFormat, dense_format
from autocomp.targets.cost_table import Choice, CostTable, Entry
from autocomp.targets.generation import PAST
from autocomp.targets.graph import Graph, attribute, cut
from autocomp.targets.runtime import Array, CpuTarget
from autocomp.targets.skeleton_format import DOMAIN, dense_formats
from autocomp.targets.token_profile import (
    Piece,
    UnitReductions,
    chosen_reductions,
    reduction_bytes,
    token_costs,
    token_pieces,
)
from autocomp.targets.weights import stand_in_weights

Progress = Callable[[int, int], None]
UnitFormats = Mapping[str, Mapping[str, UnitFormat]]
"""Unit name → option key → formats."""

_WHOLE = {"runs": 48, "rounds": 8, "seconds": 0.4}


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
    total = candidates + 3
    _report(progress, 0, total)
    pieces = _pieces(target, skeleton, units, unit_formats, inputs)
    lengths, extra = token_pieces(skeleton, units, reductions or {}, inputs, pieces)
    pieces |= extra
    timings = target.time_pieces(list(pieces.values()), seed=seed)
    times = dict(zip(pieces, map(target.to_ms, timings), strict=True))
    keys = {
        unit.name: {
            key: _cost_key(unit, formats, target)
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
                + reduction_bytes(extra, reductions, unit.name, key),
                _kernels(formats, target),
            )
            for key, formats in unit_formats[unit.name].items()
        }
        for unit in units
    }
    _report(progress, 1, total)
    dense = {unit.name: dense_format(unit) for unit in units}
    whole = lower_formats(target, skeleton, units, dense)
    in_units = sum(target.size_bytes(one) for formats in dense.values() for one in formats.values())
    smallest = {
        unit.name: min(unit_formats[unit.name], key=lambda k: entries[unit.name][k].latency_ms)
        for unit in units
    }
    measure = partial(
        _measure_choice, target, skeleton, units, unit_formats, inputs=inputs, reductions=reductions
    )
    least = measure(smallest)
    known = sum(entries[unit][key].latency_ms for unit, key in smallest.items())
    _report(progress, 2, total)
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
        pairs.append((choice, measure(choice)))
        _report(progress, 3 + index, total)
    table.fit(pairs)
    _report(progress, total, total)
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
    return target.lower_weights(skeleton, stand_in_weights(sites), reductions=reductions)


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
    inputs = _in_range(inputs, formats)
    return target.to_ms(target.time_graph(lowered, inputs, **_WHOLE))


def _in_range(inputs: Mapping[str, Array], formats: Mapping[str, UnitFormat]) -> dict[str, Array]:
    """Token ids within the smallest table: which row is read makes no difference to costs."""
    tables = [one.rows for unit in formats.values() for one in unit.values() if one.embedding]
    result = dict(inputs)
    if tables and "input_ids" in result:
        result["input_ids"] = result["input_ids"] % min(tables)
    return result


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


def _cost_key(unit: Unit, formats: UnitFormat, target: CpuTarget) -> object:
    """Equal for options that run the same kernels on the same shapes."""
    shapes = []
    roles = {site.name: site.role for site in unit.sites}
    for name, one in formats.items():
        kernel = target.recipes.kernel(one, target.tokens)
        site = site_of(name)
        part = name.removeprefix(site)
        shapes.append((roles[site], part, one.rows, one.columns, one.bias, one.cache_bits, kernel))
    return (unit.kind, unit.head_dim, tuple(shapes))


def _pieces(
    target: CpuTarget,
    skeleton: onnx.ModelProto,
    units: Sequence[Unit],
    unit_formats: UnitFormats,
    inputs: Mapping[str, Array],
) -> dict[object, Piece]:
    """Every distinct piece, lowered, with the inputs to run it on."""
    graph = Graph(skeleton)
    wanted: dict[object, tuple[Unit, UnitFormat]] = {}
    for unit in units:
        for formats in unit_formats[unit.name].values():
            if formats:
                wanted.setdefault(_cost_key(unit, formats, target), (unit, formats))
    owners = {unit.name: unit for unit, _ in wanted.values()}
    cuts = {name: _cut_unit(graph, unit) for name, unit in owners.items()}
    caches = {value.name for value in graph.input_infos if value.name.startswith(PAST)}
    needed = {name for _, outside, _ in cuts.values() for name in outside} - set(inputs) - caches
    values = dict(inputs) | _record(target, skeleton, inputs, sorted(needed))
    result: dict[object, Piece] = {}
    for key, (unit, formats) in wanted.items():
        nodes, outside, end = cuts[unit.name]
        read = {name: values[name] for name in outside if name not in caches}
        piece = _as_model(skeleton, nodes, read, end)
        piece.graph.input.extend(v for v in graph.input_infos if v.name in caches & set(outside))
        lowered = target.lower_weights(piece, stand_in_weights(formats))
        result[key] = (lowered, _in_range(read, {unit.name: formats}))
    return result


def _cut_unit(graph: Graph, unit: Unit) -> tuple[list[onnx.NodeProto], list[str], str]:
    """Nodes, outside tensors and output of a unit's piece."""
    sites = {site.name for site in unit.sites}
    markers = [
        node
        for node in graph.nodes
        if node.domain == DOMAIN and attribute(node, "site", "") in sites
    ]
    made = {node.output[0] for node in markers}
    below = set(made)
    for node in graph.nodes:
        if any(name in below for name in node.input):
            below.update(node.output)
    starts = {node.input[0] for node in markers if node.input[0] not in below}
    end = markers[-1].output[0]
    nodes, outside = cut(graph, starts, end)
    return nodes, outside, end


def _record(
    target: CpuTarget,
    skeleton: onnx.ModelProto,
    inputs: Mapping[str, Array],
    names: Sequence[str],
) -> dict[str, Array]:
    """Values of inner tensors of the dense graph."""
    if not names:
        return {}
    dense = target.lower_weights(skeleton, stand_in_weights(dense_formats(skeleton)))
    for name in names:
        dense.graph.output.append(onnx.ValueInfoProto(name=name))
    return target.run_graph(dense, inputs, names)


def _as_model(
    skeleton: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    outside: Mapping[str, Array],
    end: str,
) -> onnx.ModelProto:
    model = onnx.ModelProto(ir_version=skeleton.ir_version)
    model.opset_import.extend(skeleton.opset_import)
    model.graph.name = "piece"
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(skeleton.graph.initializer)
    for name, value in outside.items():
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        hidden = value.ndim == 3 and np.issubdtype(value.dtype, np.floating)  # (B, T, D)
        dims = [None, None, value.shape[-1]] if hidden else [None] * value.ndim
        model.graph.input.append(helper.make_tensor_value_info(name, kind, dims))
    output = helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, None)
    model.graph.output.append(output)
    return model


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


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
