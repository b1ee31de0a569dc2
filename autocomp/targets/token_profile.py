"""Measuring what the length of the sequence costs: pieces of a model on shorter inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import Unit
from autocomp.targets.graph import attribute
from autocomp.targets.skeleton_format import DOMAIN
from autocomp.targets.token_costs import TokenCosts, measured_lengths, reduction_key
from autocomp.targets.token_nodes import reduction_model
from autocomp.targets.weights import Array

UnitReductions = Mapping[str, Mapping[str, TokenReduction]]
"""Unit name → option key → what the option does to the sequence behind the unit."""
Piece = tuple[onnx.ModelProto, Mapping[str, Array]]
AtLength = Callable[[object, int], onnx.ModelProto | None]
"""Key of a piece, tokens per example → its graph for so many; `None` where there is none."""


def dense_tokens(skeleton: onnx.ModelProto) -> int | None:
    """Tokens per example of the dense model; `None` where no place to reduce them is marked."""
    return next((int(attribute(node, "tokens")) for node in _markers(skeleton)), None)


def token_pieces(
    skeleton: onnx.ModelProto,
    units: Sequence[Unit],
    reductions: UnitReductions,
    inputs: Mapping[str, Array],
    pieces: Mapping[object, Piece],
    at_length: AtLength,
) -> tuple[tuple[int, ...], dict[object, Piece]]:
    """Lengths to measure at, and what is timed beside `pieces`; nothing without reductions.

    Args:
        inputs: model inputs at the workload's shape.
        pieces: the units' pieces by cost key, with inputs at the dense length.
        at_length: the graph of a piece for another length.
    """
    tokens = dense_tokens(skeleton)
    if not any(reductions.values()) or tokens is None:
        return (), {}
    ordered = {unit.name: reductions.get(unit.name, {}) for unit in units}
    lengths = measured_lengths(ordered, tokens)
    batch = next(iter(inputs.values())).shape[0]
    shorter = shorter_pieces(pieces, tokens, lengths, at_length)
    return lengths, {**shorter, **reduction_pieces(skeleton, units, reductions, lengths, batch)}


def chosen_reductions(
    reductions: UnitReductions, choice: Mapping[str, str]
) -> dict[str, TokenReduction]:
    """Unit → what its chosen option does to the sequence; units without are left out."""
    return {
        unit: options[choice[unit]]
        for unit, options in reductions.items()
        if choice[unit] in options
    }


def reduction_bytes(
    pieces: Mapping[object, Piece], reductions: UnitReductions | None, unit: str, key: str
) -> int:
    """Bytes of the nodes that shorten the sequence behind a unit, about.

    `pieces` are those of `token_pieces`.
    """
    reduction = (reductions or {}).get(unit, {}).get(key)
    if reduction is None:
        return 0
    wanted = reduction_key(reduction)
    return max(
        (
            model.ByteSize()
            for at, (model, _) in pieces.items()
            if isinstance(at, tuple) and at[0] == wanted
        ),
        default=0,
    )


def shorter_pieces(
    pieces: Mapping[object, Piece], tokens: int, lengths: Sequence[int], at_length: AtLength
) -> dict[object, Piece]:
    """(key, length) → the piece with its inputs cut to that length, for every length but `tokens`.

    A piece that reads no sequence of `tokens` tokens is left out: it costs the same at any length.
    So is one that has no graph for some length.
    """
    found: dict[object, Piece] = {}
    for key, (_, inputs) in pieces.items():
        sequences = [n for n, v in inputs.items() if v.ndim == 3 and v.shape[1] == tokens]
        shorter = [length for length in lengths if sequences and length != tokens]
        models = {length: at_length(key, length) for length in shorter}
        for length, model in models.items():
            if model is not None and None not in models.values():
                cut = {n: inputs[n][:, :length].copy() for n in sequences}
                found[key, length] = (model, {**inputs, **cut})
    return found


def reduction_pieces(
    skeleton: onnx.ModelProto,
    units: Sequence[Unit],
    reductions: UnitReductions,
    lengths: Sequence[int],
    batch: int,
) -> dict[object, Piece]:
    """(`reduction_key`, length) → every distinct reduction alone."""
    rng = np.random.default_rng(0)
    by_unit = {str(attribute(node, "unit")): node for node in _markers(skeleton)}
    found: dict[object, Piece] = {}
    for unit in units:
        for reduction in reductions.get(unit.name, {}).values():
            width, head_dim = (
                int(attribute(by_unit[unit.name], name)) for name in ("width", "head_dim")
            )
            inner = head_dim * (unit.heads or 1)
            columns = {"x": width, "queries": inner, "keys": inner, "sizes": 1}
            for tokens in lengths:
                key = (reduction_key(reduction), tokens)
                if key in found or not reduction.removed(tokens):
                    continue
                model = reduction_model(
                    reduction, tokens=tokens, width=width, inner=inner, head_dim=head_dim
                )
                feeds = {
                    name: rng.standard_normal((batch, tokens, c)).astype(np.float32)
                    for name, c in columns.items()
                }
                feeds["sizes"] = np.abs(feeds["sizes"]) + 1
                found[key] = (model, feeds)
    return found


def token_costs(
    lengths: Sequence[int],
    keys: Mapping[str, Mapping[str, object]],
    reductions: UnitReductions,
    times: Mapping[object, float],
) -> TokenCosts:
    """The costs from what was timed.

    Args:
        keys: unit → option key → key of its piece.
        times: ms by key of a piece (dense length), (key, length) and (`reduction_key`, length).
    """
    dense = lengths[-1]
    curves = {
        unit: {
            key: tuple(times[piece if length == dense else (piece, length)] for length in lengths)
            for key, piece in options.items()
            if (piece, lengths[0]) in times
        }
        for unit, options in keys.items()
    }
    own: dict[str, tuple[float, ...]] = {}
    for options in reductions.values():
        for reduction in options.values():
            name, curve, latency = reduction_key(reduction), [], 0.0
            for length in reversed(lengths):  # where no token goes, nothing was timed
                latency = times.get((name, length), latency)
                curve.append(latency)
            own[name] = tuple(reversed(curve))
    return TokenCosts(tuple(lengths), curves, reductions, own)


def _markers(skeleton: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in skeleton.graph.node if n.domain == DOMAIN and n.op_type == "Tokens"]
