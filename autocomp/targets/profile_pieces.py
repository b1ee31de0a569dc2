"""The sublayers a cost table times: cut from the skeleton, lowered from formats.

A unit's piece reaches from what feeds its first sites to the output of its last; what else it reads
(mask, rotary tables) is recorded once from a run of the dense graph. A mixer is part of its piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper

from autocomp.core.factors import site_of
from autocomp.core.unit import SiteFormat, Unit, UnitFormat, dense_format
from autocomp.targets.generation import PAST
from autocomp.targets.graph import Graph, attribute, cut
from autocomp.targets.mixer_nodes import Seat
from autocomp.targets.mixer_profile import arriving, made_up_mixer, mixer_name, takes
from autocomp.targets.runtime import Array, CpuTarget
from autocomp.targets.skeleton_format import DOMAIN, dense_formats
from autocomp.targets.token_profile import Piece
from autocomp.targets.weights import stand_in_weights

UnitFormats = Mapping[str, Mapping[str, UnitFormat]]
"""Unit name → option key → formats."""


class UnitPieces:
    """Every distinct piece of a model.

    Args:
        unit_formats: the formats of every option of every unit; an empty one is a skipped unit.
        inputs: model inputs at the workload's shape.
    """

    def __init__(
        self,
        target: CpuTarget,
        skeleton: onnx.ModelProto,
        units: Sequence[Unit],
        unit_formats: UnitFormats,
        inputs: Mapping[str, Array],
    ) -> None:
        self._target, self._skeleton, self._graph = target, skeleton, Graph(skeleton)
        self._wanted: dict[object, tuple[Unit, UnitFormat]] = {}
        for unit in units:
            for formats in unit_formats[unit.name].values():
                if formats:
                    key = cost_key(unit, formats, target)
                    self._wanted.setdefault(key, (unit, formats))
        owners = {unit.name: unit for unit, _ in self._wanted.values()}
        self._cuts = {name: _cut_unit(self._graph, unit) for name, unit in owners.items()}
        infos = self._graph.input_infos
        self._caches = {value.name for value in infos if value.name.startswith(PAST)}
        read = {name for _, outside, _ in self._cuts.values() for name in outside}
        needed = read - set(inputs) - self._caches
        self._values = dict(inputs) | _record(target, skeleton, inputs, sorted(needed))
        self._added: dict[object, int] = {}

    def lowered(self) -> dict[object, Piece]:
        """`cost_key` → graph, with the inputs to run it on."""
        return {
            key: (self._lower(unit, formats), in_range(self._read(unit), {unit.name: formats}))
            for key, (unit, formats) in self._wanted.items()
        }

    def at_length(self, key: object, tokens: int) -> onnx.ModelProto | None:
        """A piece for `tokens` patches; `None` where its mixer takes another number alone."""
        unit, formats = self._wanted[key]
        if not takes(unit, formats, tokens):
            return None
        return self._lower(unit, formats, tokens)

    def mixer_bytes(self, unit: Unit, formats: UnitFormat) -> int:
        """Bytes on disk of a unit's mixer beyond those of attention; 0 without one."""
        if mixer_name(formats) is None:
            return 0
        owner, formats = self._wanted[cost_key(unit, formats, self._target)]
        plain = {
            name: SiteFormat(one.rows, one.columns, one.bias, mixer=one.mixer)
            for name, one in formats.items()
        }
        key = cost_key(owner, plain, self._target)
        if key not in self._added:
            attention = self._beside_sites(owner, dense_format(owner))
            self._added[key] = self._beside_sites(owner, plain) - attention
        return self._added[key]

    def _beside_sites(self, unit: Unit, formats: UnitFormat) -> int:
        sites = sum(self._target.size_bytes(one) for one in formats.values())
        return self._target.lowered_bytes(self._lower(unit, formats)) - sites

    def _read(self, unit: Unit) -> dict[str, Array]:
        _, outside, _ = self._cuts[unit.name]
        return {name: self._values[name] for name in outside if name not in self._caches}

    def _lower(self, unit: Unit, formats: UnitFormat, tokens: int | None = None) -> onnx.ModelProto:
        nodes, outside, end = self._cuts[unit.name]
        piece = _as_model(self._skeleton, nodes, self._read(unit), end)
        caches = self._caches & set(outside)
        piece.graph.input.extend(v for v in self._graph.input_infos if v.name in caches)
        seats = {}
        query = unit.site("query")
        if query is not None and mixer_name(formats) is not None:
            mixer = made_up_mixer(unit, formats)
            if mixer.shape.prefix is not None:
                tokens = tokens or arriving(self._skeleton, unit)
            seats[query.name] = Seat(unit.name, mixer, tokens)
        return self._target.lower_weights(piece, stand_in_weights(formats), seats=seats)


def cost_key(unit: Unit, formats: UnitFormat, target: CpuTarget) -> object:
    """Equal for options that run the same kernels on the same shapes."""
    shapes = []
    roles = {site.name: site.role for site in unit.sites}
    for name, one in formats.items():
        kernel = target.recipes.kernel(one, target.tokens)
        site = site_of(name)
        part = name.removeprefix(site)
        shapes.append((roles[site], part, one.rows, one.columns, one.bias, one.cache_bits, kernel))
    return (unit.kind, unit.head_dim, tuple(shapes), mixer_name(formats))


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


def in_range(inputs: Mapping[str, Array], formats: Mapping[str, UnitFormat]) -> dict[str, Array]:
    """Token ids within the smallest table: which row is read makes no difference to costs."""
    tables = [one.rows for unit in formats.values() for one in unit.values() if one.embedding]
    result = dict(inputs)
    if tables and "input_ids" in result:
        result["input_ids"] = result["input_ids"] % min(tables)
    return result
