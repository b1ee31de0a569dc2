"""Mixers in a graph: an attention marker becomes a marker of its mixer, and that its nodes.

    autocomp::Mixer(x, q, k, v[, real][, past…]; unit, …)  → (B, T, H·D)[, present…]

`place_mixers` comes first: what feeds projections a mixer does not read is dead from then on, and
nothing asks for its weights. The marker stays one node until every site is filled in, so that
skipping, low rank and the cache of other attentions need not know of it.

Where a graph decodes, a mixer has a state of constant size instead of a cache that grows:

    past_state.N.NAME, present_state.N.NAME   (B, …), zero before the first token

N being the layer's number in the dense model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocomp.core.errors import InternalError
from autocomp.targets.generation import PAST_STATE, PRESENT_STATE
from autocomp.targets.graph import Graph, attribute
from autocomp.targets.skeleton_format import DOMAIN
from autocomp.targets.storage import Piece

if TYPE_CHECKING:
    from autocomp.models.mixers.protocol import Mixer
    from autocomp.targets.mixer_graph import MixerGraph
    from autocomp.targets.token_nodes import Reductions

_ROLES = ("query", "key", "value")


@dataclass(frozen=True)
class Seat:
    """A mixer in its place.

    Attributes:
        unit: name of the attention unit.
        mixer: with its parameters.
        tokens: tokens per example where they are images' patches, `None` for text.
    """

    unit: str
    mixer: Mixer
    tokens: int | None = None


Seats = Mapping[str, Seat]
"""Name of the unit's query site → what sits there in place of attention."""


@dataclass(frozen=True)
class _Placed:
    """A marker's mixer. `inputs` and `outputs` name the marker's in the mixer's own terms."""

    seat: Seat
    graph: MixerGraph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


Placed = Mapping[str, _Placed]
"""First output of a marker → its mixer."""


def place_mixers(graph: Graph, seats: Seats) -> Placed:
    """Put mixers in the place of attention markers, and their states among inputs and outputs.

    Nodes are replaced, not modified; what is dead then is gone.

    Raises:
        InternalError: for a seat without a marker, or a mixer that cannot be exported.
    """
    placed: dict[str, _Placed] = {}
    waiting = dict(seats)
    for node in [n for n in graph.nodes if n.domain == DOMAIN and n.op_type == "Attention"]:
        seat = waiting.pop(str(attribute(node, "query_site")), None)
        if seat is not None:
            placed[node.output[0]] = _place(graph, node, seat)
    if waiting:
        units = ", ".join(seat.unit for seat in waiting.values())
        raise InternalError(f"the skeleton has no attention where {units} has a mixer")
    if placed:
        graph.prune()
    return placed


def check_reductions(seats: Seats, reductions: Reductions) -> None:
    """Raises InternalError where tokens go by keys or queries that a mixer does not read."""
    for seat in seats.values():
        needed = {"key"} if seat.unit in reductions else set()
        if needed and reductions[seat.unit].method != "tome":
            needed.add("query")
        if missing := sorted(needed - set(seat.mixer.reads)):
            raise InternalError(
                f"{seat.unit}: tokens are chosen by its {' and '.join(missing)}, which mixer "
                f"{seat.mixer.name!r} does not read: reduce tokens behind another unit"
            )


def _place(graph: Graph, node: onnx.NodeProto, seat: Seat) -> _Placed:
    from autocomp.targets.mixer_graph import mixer_graph

    site = attribute(node, "query_site")
    decode = len(node.output) > 1
    masked = len(node.input) > 3 and bool(node.input[3])
    made = mixer_graph(seat.mixer, masked=masked, decode=decode, tokens=seat.tokens)
    linear = next(n for n in graph.nodes if n.domain == DOMAIN and attribute(n, "site") == site)
    sources = {"x": linear.input[0], **dict(zip(_ROLES, node.input[:3], strict=True))}
    if "real" in made.inputs:
        sources["real"] = _real_tokens(graph, node.input[3])
    names, outputs = [name for name in sources if name in made.inputs], [node.output[0]]
    tensors = [sources[name] for name in names]
    ahead = f"{attribute(node, 'layer')}."
    for name, shape in made.state.items():
        past, present = f"{PAST_STATE}{ahead}{name}", f"{PRESENT_STATE}{ahead}{name}"
        for infos, tensor in ((graph.input_infos, past), (graph.output_infos, present)):
            dims: list[str | int | None] = ["batch", *shape]
            infos.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, dims))
        names.append(f"past.{name}")
        tensors.append(past)
        outputs.append(present)
    caches = set(node.output[1:])
    graph.output_infos = [value for value in graph.output_infos if value.name not in caches]
    marker = helper.make_node("Mixer", tensors, outputs, domain=DOMAIN)
    marker.attribute.extend(a for a in node.attribute if a.name in ("flat", "head_dim"))
    graph.nodes[graph.nodes.index(node)] = marker
    return _Placed(seat, made, tuple(names), made.outputs)


def _real_tokens(graph: Graph, mask: str) -> str:
    """bool `(B, T)` of an additive mask `(B, 1, T, T)`: the tokens the last one may look at."""
    output = f"{mask}.real"
    if graph.producer(output) is not None:
        return output
    made = graph.producer(mask)
    rows = made.input[0] if made is not None and made.op_type == "Expand" else mask
    last, axis, padding = f"{output}.last", f"{output}.axis", f"{output}.padding"
    graph.initializers[last] = numpy_helper.from_array(np.array(-1, np.int64), last)
    graph.initializers[axis] = numpy_helper.from_array(np.array([1], np.int64), axis)
    graph.initializers[padding] = numpy_helper.from_array(np.array(-1, np.float32), padding)
    new = [
        helper.make_node("Gather", [rows, last], [f"{output}.row"], axis=2),
        helper.make_node("Squeeze", [f"{output}.row", axis], [f"{output}.keys"]),
        helper.make_node("Greater", [f"{output}.keys", padding], [output]),
    ]
    index = 0 if made is None else graph.nodes.index(made)
    graph.nodes[index:index] = new
    return output


def lower_mixer(node: onnx.NodeProto, placed: _Placed) -> Piece:
    """The nodes of a mixer's marker; heads are split before and joined behind them."""
    head_dim, prefix = int(attribute(node, "head_dim")), f"{placed.seat.unit}.mixer"
    piece = Piece()

    def shape(name: str, *dims: int) -> str:
        piece.initializers.append(numpy_helper.from_array(np.array(dims, np.int64), name))
        return name

    def add(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        piece.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    names = dict(zip(placed.inputs, node.input, strict=True))
    for role in _ROLES:
        if role in names and attribute(node, "flat"):
            split = shape(f"heads.split{head_dim}", 0, 0, -1, head_dim)
            apart = add("Reshape", [names[role], split], f"{prefix}.{role}.split")
            names[role] = add("Transpose", [apart], f"{prefix}.{role}", perm=[0, 2, 1, 3])
    names |= dict(zip(placed.outputs, node.output, strict=True))
    output, names["out"] = names["out"], f"{prefix}.out"
    parameters = {
        name: tensor.detach().cpu().contiguous().numpy()
        for name, tensor in placed.seat.mixer.state_dict().items()
    }
    nodes, initializers = placed.graph.placed(prefix, names, parameters)
    piece.nodes += nodes
    piece.initializers += initializers
    turned = add("Transpose", [names["out"]], f"{prefix}.turned", perm=[0, 2, 1, 3])
    add("Reshape", [turned, shape("heads.join", 0, 0, -1)], output)
    return piece


def student_seats(
    skeleton: onnx.ModelProto, model: Any, units: Any, reductions: Mapping[str, Any]
) -> dict[str, Seat]:
    """The mixers seated in a torch model."""
    from autocomp.models.seat import mixer_of

    found = {unit: mixer_of(model, unit) for unit in units}
    return seated(skeleton, {u: m for u, m in found.items() if m is not None}, reductions)


def seated(
    skeleton: onnx.ModelProto, mixers: Mapping[Any, Mixer], reductions: Mapping[str, Any]
) -> dict[str, Seat]:
    """Mixers by unit as seats, with the tokens that arrive at each where those are patches."""
    from autocomp.targets.token_nodes import sequence_lengths

    lengths = sequence_lengths(skeleton.graph.node, reductions) if mixers else {}
    seats = {}
    for unit, mixer in mixers.items():
        fixed = mixer.shape.prefix is not None
        query = unit.site("query").name
        seats[query] = Seat(unit.name, mixer, lengths.get(unit.name) if fixed else None)
    return seats
