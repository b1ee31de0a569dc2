"""Small edits on ONNX graphs: look up, rewire, fold zeros, drop what is dead, cut a piece out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

_ZERO_PRESERVING = frozenset(
    {"Identity", "Reshape", "Cast", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Slice", "Neg"}
)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute; strings decoded."""
    for item in node.attribute:
        if item.name == name:
            value = helper.get_attribute_value(item)
            return value.decode() if isinstance(value, bytes) else value
    return default


class Graph:
    """A model's graph as lists and dictionaries. Edits the protos of the model it was given."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.initializers: dict[str, onnx.TensorProto] = {
            tensor.name: tensor for tensor in model.graph.initializer
        }
        self.input_infos = list(model.graph.input)
        self.output_infos = list(model.graph.output)
        self.values: list[onnx.ValueInfoProto] = []

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return [value.name for value in self.input_infos]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return [value.name for value in self.output_infos]

    def producer(self, tensor: str) -> onnx.NodeProto | None:
        """The node that computes `tensor`; `None` for inputs and initializers."""
        return next((node for node in self.nodes if tensor in node.output), None)

    def users(self, tensor: str) -> list[onnx.NodeProto]:
        """The nodes that read `tensor`."""
        return [node for node in self.nodes if tensor in node.input]

    def replace_uses(self, old: str, new: str) -> None:
        """Read `new` wherever `old` was read."""
        for node in self.users(old):
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new

    def rename_initializers(self, rename: Callable[[str], str]) -> None:
        """Rename initializers and every use of them."""
        names = {name: rename(name) for name in self.initializers}
        for node in self.nodes:
            for index, name in enumerate(node.input):
                if name in names:
                    node.input[index] = names[name]
        for tensor in self.initializers.values():
            tensor.name = names[tensor.name]
        self.initializers = {tensor.name: tensor for tensor in self.initializers.values()}

    def upstream_site(self, tensor: str) -> str | None:
        """The site of the nearest linear marker above `tensor`, breadth first."""
        queue, seen = [tensor], {tensor}
        while queue:
            node = self.producer(queue.pop(0))
            if node is None:
                continue
            if node.op_type == "Linear":
                return str(attribute(node, "site"))
            for name in node.input:
                if name and name not in seen:
                    seen.add(name)
                    queue.append(name)
        return None

    def before_heads(self, tensor: str) -> str | None:
        """`x` if `tensor` is `Transpose(Reshape(x), 0 2 1 3)`, the split of x into heads."""
        transpose = self.producer(tensor)
        if transpose is None or transpose.op_type != "Transpose":
            return None
        if list(attribute(transpose, "perm", [])) != [0, 2, 1, 3]:
            return None
        reshape = self.producer(transpose.input[0])
        if reshape is None or reshape.op_type != "Reshape":
            return None
        source = self.producer(reshape.input[0])
        return reshape.input[0] if source is not None and source.op_type == "Linear" else None

    def joined_heads(self, tensor: str) -> str | None:
        """`(B, T, H·D)` from `tensor` `(B, H, T, D)` if that is `Transpose(x, 0 2 1 3)`."""
        transpose = self.producer(tensor)
        if transpose is None or transpose.op_type != "Transpose":
            return None
        if list(attribute(transpose, "perm", [])) != [0, 2, 1, 3]:
            return None
        output, shape = f"{transpose.input[0]}.joined", "heads.joined"
        if self.producer(output) is None:
            self.initializers[shape] = numpy_helper.from_array(
                np.array([0, 0, -1], np.int64), shape
            )
            node = helper.make_node("Reshape", [transpose.input[0], shape], [output])
            self.nodes.insert(self.nodes.index(transpose), node)
        return output

    def expanded_to_batch(self, tensor: str) -> str:
        """`tensor` `(1, …)` repeated to `(B, …)`, B being the first axis of the first input."""
        output, shape = f"{tensor}.expanded", f"{self.inputs[0]}.batch"
        if any(output in node.output for node in self.nodes):
            return output
        ones = f"{shape}.ones"
        self.initializers[ones] = numpy_helper.from_array(np.array([1, 1], np.int64), ones)
        new = [
            helper.make_node("Shape", [self.inputs[0]], [f"{shape}.size"], start=0, end=1),
            helper.make_node("Concat", [f"{shape}.size", ones], [f"{shape}.shape"], axis=0),
        ]
        present = {name for node in self.nodes for name in node.output}
        new = [node for node in new if node.output[0] not in present]
        new.append(helper.make_node("Expand", [tensor, f"{shape}.shape"], [output]))
        index = next(i for i, node in enumerate(self.nodes) if tensor in node.output)
        self.nodes[index + 1 : index + 1] = new
        return output

    def merge_equal(self) -> None:
        """Compute equal things once: drop nodes that repeat another's operator and inputs."""
        seen: dict[tuple[Any, ...], onnx.NodeProto] = {}
        for node in list(self.nodes):
            attributes = tuple(sorted(item.SerializeToString() for item in node.attribute))
            key = (node.domain, node.op_type, tuple(node.input), attributes)
            first = seen.setdefault(key, node)
            if first is not node:
                for old, new in zip(node.output, first.output, strict=True):
                    self.replace_uses(old, new)

    def prune(self) -> None:
        """Drop nodes and initializers that no output depends on."""
        needed = set(self.outputs)
        kept: list[onnx.NodeProto] = []
        for node in reversed(self.nodes):
            if any(name in needed for name in node.output):
                kept.append(node)
                needed.update(name for name in node.input if name)
        self.nodes = kept[::-1]
        self.initializers = {k: v for k, v in self.initializers.items() if k in needed}

    def to_model(self, opset: Iterable[onnx.OperatorSetIdProto] | None = None) -> onnx.ModelProto:
        """The model with the present nodes and initializers; of inner types only `values`."""
        graph = onnx.GraphProto(name=self.model.graph.name or "model")
        graph.node.extend(self.nodes)
        graph.initializer.extend(self.initializers.values())
        graph.input.extend(self.input_infos)
        graph.output.extend(self.output_infos)
        graph.value_info.extend(self.values)
        model = onnx.ModelProto(ir_version=10, producer_name="autocomp")
        model.opset_import.extend(self.model.opset_import if opset is None else opset)
        model.graph.CopyFrom(graph)
        return model


def fold_zeros(nodes: Iterable[onnx.NodeProto], zeros: Iterable[str]) -> list[onnx.NodeProto]:
    """Nodes of a graph in which the tensors `zeros` are zero: sums lose them, products vanish.

    `nodes` are in topological order and are copied where they change. Users of a tensor that
    equals another read the other one instead.
    """
    zero = set(zeros)
    alias: dict[str, str] = {}
    result: list[onnx.NodeProto] = []
    for node in nodes:
        if any(name in zero or name in alias for name in node.input):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            node = copy
            for index, name in enumerate(node.input):
                node.input[index] = alias.get(name, name)
        dead = [name for name in node.input if name in zero]
        if dead and not node.domain:
            if node.op_type in ("Add", "Sum"):
                live = [name for name in node.input if name not in zero]
                if not live:
                    zero.add(node.output[0])
                    continue
                if len(live) == 1:
                    alias[node.output[0]] = live[0]
                    continue
            if node.op_type == "Mul" or (
                node.op_type in _ZERO_PRESERVING and node.input[0] in zero
            ):
                zero.add(node.output[0])
                continue
        result.append(node)
    return result


def cut(graph: Graph, starts: set[str], end: str) -> tuple[list[onnx.NodeProto], list[str]]:
    """The nodes between `starts` and `end`, and the tensors they need from outside.

    A node belongs to the piece if it lies on a path from a start to the end. Returned in
    topological order; the outside tensors are the starts and whatever else is read.
    """
    below = set(starts)
    on_path: set[int] = set()
    for index, node in enumerate(graph.nodes):
        if any(name in below for name in node.input):
            below.update(node.output)
            on_path.add(index)
    needed = {end}
    piece: list[onnx.NodeProto] = []
    for index in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[index]
        if index in on_path and any(n in needed and n not in starts for n in node.output):
            piece.append(node)
            needed.update(name for name in node.input if name)
    piece.reverse()
    made = {name for node in piece for name in node.output}
    outside: dict[str, None] = {}
    for node in piece:
        for name in node.input:
            if name and name not in made and name not in graph.initializers:
                outside[name] = None
    return piece, list(outside)
