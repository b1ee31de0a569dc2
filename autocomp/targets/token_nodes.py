"""Merging, dropping and fusing tokens as standard ONNX nodes: `models/tokens.py` in a graph.

The number of tokens is known where a model is lowered, so every count and stride is a constant and
only the batch stays open. Sizes of merged tokens run along from marker to marker.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocomp.core.errors import InternalError
from autocomp.core.tokens import TokenReduction
from autocomp.targets.graph import attribute
from autocomp.targets.skeleton_format import DOMAIN, OPSET
from autocomp.targets.weights import Array

Reductions = Mapping[str, TokenReduction]
"""Attention unit → what is done to the sequence behind it."""

_TINY = 1e-12
"""Least norm that keys are divided by, as in torch."""


class _Nodes:
    """Collects nodes and constants under one prefix."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def constant(self, values: Any, dtype: type = np.int64) -> str:
        array: Array = np.array(values, dtype)
        label = "x".join(str(value) for value in array.flatten().tolist()).replace("-", "m")
        name = f"{self.prefix}.{np.dtype(dtype).name}.{array.ndim}.{label}"
        self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def __call__(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Add a node; the name of its last output."""
        name = f"{self.prefix}.{len(self.nodes)}"
        names = [f"{name}.{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
        return names[-1]

    def slice(self, x: str, start: int, stop: int, step: int = 1) -> str:
        """`x[:, start:stop:step]`."""
        bounds = [self.constant([value]) for value in (start, stop, 1, step)]
        return self("Slice", x, *bounds)

    def take(self, x: str, index: str) -> str:
        """Rows of `x` `(B, T, C)` by `index` `(B, N, 1)`."""
        return self("GatherND", x, index, batch_dims=1)

    def ordered(self, index: str, count: int) -> str:
        """`index` `(B, count)` in ascending order, `(B, count, 1)`."""
        self("TopK", index, self.constant([count]), outputs=2, axis=1, largest=0, sorted=1)
        return self("Unsqueeze", self.nodes[-1].output[0], self.constant([2]))

    def ones(self, x: str, tokens: int) -> str:
        """`(B, tokens, 1)` of ones, B as in `x`."""
        batch = self("Shape", x, start=0, end=1)
        shape = self("Concat", batch, self.constant([tokens, 1]), axis=0)
        return self("Expand", self.constant([1.0], np.float32), shape)


def _merge(
    add: _Nodes, x: str, keys: str, sizes: str | None, shape: Mapping[str, int]
) -> tuple[str, str]:
    """`models.tokens.merge_tokens`: names of the shorter sequence and of its sizes."""
    tokens, count, protected = shape["tokens"], shape["chosen"], shape["protected"]
    even, odd = protected + protected % 2, protected + 1 - protected % 2
    evens = len(range(even, tokens, 2))
    heads = add("Reshape", keys, add.constant([0, 0, -1, shape["head_dim"]]))
    metric = add("ReduceMean", heads, add.constant([2]), keepdims=0)
    norm = add("ReduceL2", metric, add.constant([2]), keepdims=1)
    metric = add("Div", metric, add("Max", norm, add.constant(_TINY, np.float32)))
    others = add("Transpose", add.slice(metric, odd, tokens, 2), perm=[0, 2, 1])
    scores = add("MatMul", add.slice(metric, even, tokens, 2), others)
    best = add("ReduceMax", scores, add.constant([2]), keepdims=0)
    partner = add("ArgMax", scores, axis=2, keepdims=0)
    order = add("TopK", best, add.constant([evens]), outputs=2, axis=1, largest=1, sorted=1)
    merged = add.slice(order, 0, count)
    two = add.constant([2])
    partner = add("Unsqueeze", add("GatherElements", partner, merged, axis=1), two)
    merged = add("Unsqueeze", merged, two)
    x_even, x_odd = add.slice(x, even, tokens, 2), add.slice(x, odd, tokens, 2)
    source = add.take(x_even, merged)
    whole = add.ones(x, tokens) if sizes is None else sizes
    size_even, size_odd = add.slice(whole, even, tokens, 2), add.slice(whole, odd, tokens, 2)
    size_merged = add.take(size_even, merged)
    total = add("ScatterElements", size_odd, partner, size_merged, axis=1, reduction="add")
    if sizes is not None:
        x_odd, source = add("Mul", x_odd, size_odd), add("Mul", source, size_merged)
    spread = add("Expand", partner, add.constant([1, 1, shape["width"]]))
    summed = add("ScatterElements", x_odd, spread, source, axis=1, reduction="add")
    parts = [add.slice(x, 0, protected), add("Div", summed, total)]
    size_parts = [add.slice(whole, 0, protected), total]
    if evens > count:
        rest = add.ordered(add.slice(order, count, evens), evens - count)
        parts.insert(1, add.take(x_even, rest))
        size_parts.insert(1, add.take(size_even, rest))
    return add("Concat", *parts, axis=1), add("Concat", *size_parts, axis=1)


def _drop(
    add: _Nodes, x: str, queries: str, keys: str, sizes: str | None, shape: Mapping[str, int]
) -> tuple[str, str | None]:
    """`models.tokens.class_attention` and `drop_tokens`, or `fuse_tokens`."""
    tokens, protected = shape["tokens"], shape["protected"]
    places = tokens - protected
    kept = places - shape["chosen"]
    ranked = places if shape["fused"] else kept
    key = add("Reshape", keys, add.constant([0, 0, -1, shape["head_dim"]]))
    groups = add("Shape", key, start=2, end=3)
    key = add("Transpose", key, perm=[0, 2, 3, 1])
    rest = add.constant([-1, shape["head_dim"]])
    grouped = add("Concat", add.constant([0]), groups, rest, axis=0)
    query = add("Reshape", add.slice(queries, 0, 1), grouped)  # (B, groups, heads of one, D)
    scale = add.constant(shape["head_dim"] ** -0.5, np.float32)
    attention = add("Softmax", add("Mul", add("MatMul", query, key), scale), axis=-1)
    attention = add("ReduceMean", attention, add.constant([1, 2]), keepdims=0)
    patches = add.slice(attention, protected, tokens)
    best = add("TopK", patches, add.constant([ranked]), outputs=2, axis=1, largest=1, sorted=1)
    index = add.ordered(add.slice(best, 0, kept) if shape["fused"] else best, kept)

    def shorter(values: str, *more: str) -> str:
        rest = add.take(add.slice(values, protected, tokens), index)
        return add("Concat", add.slice(values, 0, protected), rest, *more, axis=1)

    if not shape["fused"]:
        return shorter(x), None if sizes is None else shorter(sizes)
    one, two = add.constant([1]), add.constant([2])
    gone = add("Unsqueeze", add.slice(best, kept, places), two)
    weights = add.take(add("Unsqueeze", patches, two), gone)
    total = add("ReduceSum", weights, one, keepdims=1)
    weights = add("Div", weights, add("Max", total, add.constant(_TINY, np.float32)))
    dropped = add.take(add.slice(x, protected, tokens), gone)
    fused = add("ReduceSum", add("Mul", dropped, weights), one, keepdims=1)
    whole = add.ones(x, tokens) if sizes is None else sizes
    masses = add.take(add.slice(whole, protected, tokens), gone)
    return shorter(x, fused), shorter(whole, add("ReduceSum", masses, one, keepdims=1))


def _reduce(
    add: _Nodes,
    reduction: TokenReduction,
    inputs: Sequence[str],
    sizes: str | None,
    *,
    tokens: int,
    width: int,
    head_dim: int,
) -> tuple[str, str | None]:
    x, queries, keys = inputs
    shape = {
        "tokens": tokens,
        "chosen": reduction.chosen(tokens),
        "fused": reduction.method == "token_fuse",
        "protected": reduction.protected,
        "width": width,
        "head_dim": head_dim,
    }
    if reduction.method == "tome":
        return _merge(add, x, keys, sizes, shape)
    return _drop(add, x, queries, keys, sizes, shape)


def _average(add: _Nodes, x: str, sizes: str, tokens: int, protected: int) -> str:
    """Patch tokens of `x` scaled by size over mean size."""
    patches = add.slice(sizes, protected, tokens)
    mean = add("ReduceMean", patches, add.constant([1]), keepdims=1)
    scaled = add("Mul", add.slice(x, protected, tokens), add("Div", patches, mean))
    return add("Concat", add.slice(x, 0, protected), scaled, axis=1)


def resolve_tokens(
    nodes: Sequence[onnx.NodeProto], reductions: Reductions
) -> tuple[list[onnx.NodeProto], dict[str, onnx.TensorProto]]:
    """`nodes` of a skeleton without token markers, and the constants that are new.

    A marker without a reduction is taken out: what read it reads its input. `nodes` are copied
    where they change.

    Raises:
        InternalError: for a reduction behind a unit that has no marker.
    """
    alias: dict[str, str] = {}
    result: list[onnx.NodeProto] = []
    constants: dict[str, onnx.TensorProto] = {}
    waiting = dict(reductions)
    tokens, sizes = 0, None
    for node in nodes:
        if any(name in alias for name in node.input):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            node = copy
            for index, name in enumerate(node.input):
                node.input[index] = alias.get(name, name)
        if node.domain != DOMAIN or node.op_type not in ("Tokens", "AveragedTokens"):
            result.append(node)
            continue
        output = node.input[0]
        if node.op_type == "Tokens":
            unit = str(attribute(node, "unit"))
            tokens = tokens or int(attribute(node, "tokens"))
            reduction = waiting.pop(unit, None)
            if reduction is not None and reduction.removed(tokens):
                add = _Nodes(f"{unit}.tokens")
                dims = {name: int(attribute(node, name)) for name in ("width", "head_dim")}
                output, sizes = _reduce(
                    add, reduction, list(node.input), sizes, tokens=tokens, **dims
                )
                tokens = reduction.kept(tokens)
                result += add.nodes
                constants |= add.initializers
        elif sizes is not None:
            add = _Nodes("averaged.tokens")
            output = _average(add, output, sizes, tokens, int(attribute(node, "protected")))
            result += add.nodes
            constants |= add.initializers
        alias[node.output[0]] = output
    if waiting:
        raise InternalError(
            f"the skeleton has no place to merge or drop tokens behind {', '.join(waiting)}"
        )
    return result, constants


def sequence_lengths(nodes: Iterable[onnx.NodeProto], reductions: Reductions) -> dict[str, int]:
    """Attention unit → tokens per example that arrive there; nothing where none are marked."""
    lengths: dict[str, int] = {}
    tokens = 0
    for node in nodes:
        if node.domain == DOMAIN and node.op_type == "Tokens":
            unit = str(attribute(node, "unit"))
            tokens = lengths[unit] = tokens or int(attribute(node, "tokens"))
            if unit in reductions:
                tokens = reductions[unit].kept(tokens)
    return lengths


def reduction_model(
    reduction: TokenReduction, *, tokens: int, width: int, inner: int, head_dim: int
) -> onnx.ModelProto:
    """A reduction alone, for timing: inputs `x` `(B, T, C)`, `queries` and `keys` `(B, T, H·D)`,
    `sizes` `(B, T, 1)`."""
    add = _Nodes("reduction")
    out, sizes = _reduce(
        add,
        reduction,
        ["x", "queries", "keys"],
        "sizes",
        tokens=tokens,
        width=width,
        head_dim=head_dim,
    )
    columns = {"x": width, "queries": inner, "keys": inner, "sizes": 1}
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        add.nodes,
        "reduction",
        [helper.make_tensor_value_info(n, kind, [None, tokens, c]) for n, c in columns.items()],
        [helper.make_tensor_value_info(n, kind, None) for n in (out, sizes) if n is not None],
        initializer=list(add.initializers.values()),
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", OPSET)])
