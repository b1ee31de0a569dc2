"""How a site's format is written for OpenVINO's CPU plugin: ONNX nodes its frontend reads, bytes.

Measured on AVX512-VNNI, 384 → 1536 → 384 twice, 32 tokens (µs): float 1590, weights decompressed at
every run 1850, 8-bit weights with activations quantised by the plugin in groups of 32 columns 770,
of 128 680, per tensor in a fixed range 560; ONNX's DynamicQuantizeLinear and MatMulInteger run
slower than float (10.9 ms against 7.3 on MiniLM). Hence:

    float      fp32 weights, MatMul + Add
    dynamic    8-bit activations without a range: Cast and Multiply of the weight, which the plugin
               leaves undone and multiplies in integers, each token's columns quantised in groups
               of their own: finer than the one scale per tensor that training assumes
    static     8-bit activations in a fixed range: FakeQuantize on the tensor, shared by the sites
               that read it in the same range, and none on the output
    unpacked   float activations: integer weights stored, made float when the model is compiled

4-bit weights with 8-bit activations are stored as int4 and widened to int8 rows when the model is
compiled: the same error argument as in `recipes`. With few tokens (decoding) the plugin reads them
as they are. Divide, not Multiply, follows the Cast of what is to be folded at compilation: the
plugin keeps Cast and Multiply as decompression and would compute it at every run.

Attention is written out as MatMul, Softmax, MatMul, which becomes one kernel (7.31 ms a MiniLM
against 7.46 from the Attention operator, whose mask is checked for rows without a key); grouped
heads and causal attention use the operator.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto

from autocomp.core.unit import SiteFormat
from autocomp.targets.attention_recipes import lower_attention as _attention_operator
from autocomp.targets.attention_recipes import lower_rotary as lower_rotary
from autocomp.targets.graph import attribute
from autocomp.targets.openvino_cache import lower_rounded
from autocomp.targets.openvino_pieces import OPENVINO, OpenVinoInputs, Writer
from autocomp.targets.skeleton_format import OPSET
from autocomp.targets.storage import Piece
from autocomp.targets.weights import Array, SiteWeights

Recipe = Literal["float", "dynamic", "static", "unpacked", "nbits", "gather", "gather-integers"]

OPSETS: Mapping[str, int] = {"": OPSET, OPENVINO: 1}
"""Operator domain → version, of every lowered graph."""
FEW_TOKENS = 2
"""Below it a linear layer is bound by reading weights: 4-bit weights stay 4-bit in memory."""

_NODE_BYTES: Mapping[str, int] = {
    "float": 1370,
    "dynamic": 3130,
    "static": 4250,
    "unpacked": 3150,
    "nbits": 3130,
    "gather": 1450,
    "gather-integers": 2560,
}
"""The site's layers in `model.xml`, about, where rows have one scale."""
_BIAS_BYTES, _GROUPED_BYTES, _SLICE_BYTES, _SCALED_BYTES = 600, 820, 2400, 900
_WIDENED_BYTES, _REGROUPED_BYTES, _CACHE_BYTES = 2210, 1960, 5000
"""What more there is of them; about."""


def group_columns(tokens: int) -> int:
    """Columns the plugin quantises together where activations are dynamic.

    It must not exceed the groups of the weights it multiplies with: at few tokens those are the
    stored ones, of 32 columns and more; else rows.
    """
    return 32 if tokens < FEW_TOKENS else 128


def recipe(format: SiteFormat, tokens: int) -> Recipe:
    """The recipe of a format for runs of `tokens` tokens."""
    if format.embedding:
        return "gather" if format.weight_bits == 32 else "gather-integers"
    if format.weight_bits == 32:
        return "float"
    if format.activation_bits == 32:
        return "unpacked"
    if format.static:
        return "static"
    return "nbits" if tokens < FEW_TOKENS and _kept_narrow(format) else "dynamic"


def kernel(format: SiteFormat, tokens: int) -> Hashable:
    """Equal for formats of one shape that run the same kernels: they are timed once."""
    kind = recipe(format, tokens)
    if kind in ("nbits", "gather-integers"):
        return (kind, format.weight_bits, format.group, format.scaled)
    return "float" if kind == "unpacked" else (kind, format.scaled)


def kernel_class(format: SiteFormat, tokens: int) -> str:
    """The class of kernels that a cost table fits one slope to."""
    kind = recipe(format, tokens)
    return {"unpacked": "float", "gather": "table", "gather-integers": "table"}.get(kind, kind)


def unsupported(format: SiteFormat, tokens: int) -> str | None:
    """Why a format cannot be lowered or would gain nothing, or `None`."""
    if format.weight_bits not in (32, 8, 4):
        return (
            f"stores {format.weight_bits}-bit weights as 4-bit ones, which would be neither "
            "smaller nor faster; available: dense, 8, 4"
        )
    if format.activation_bits not in (32, 8):
        return f"{format.activation_bits}-bit activations have no kernel; available: dense, 8"
    if format.nonzeros is not None:
        return "stores sparse weights in full: neither smaller nor faster; available: dense"
    if format.cache_bits not in (32, 8):
        return f"a cache of {format.cache_bits} bits is not written; available: dense, 8"
    if format.weight_bits == 32:
        if format.activation_bits == 8:
            return "8-bit activations need 8-bit or 4-bit weights"
        return "scaled inputs need quantised weights" if format.scaled else None
    if format.static and format.activation_bits != 8:
        return "a static range needs 8-bit activations"
    return None


def _kept_narrow(format: SiteFormat) -> bool:
    """Whether the plugin reads this format's 4-bit weights as they are stored."""
    if format.weight_bits != 4:
        return False
    return format.group is None or (format.group % 32 == 0 and format.columns % format.group == 0)


def _width(format: SiteFormat) -> int:
    """Columns that share a scale."""
    return format.columns if format.group is None else min(format.group, format.columns)


def _groups(format: SiteFormat) -> int:
    return -(-format.columns // _width(format))


def size_bytes(format: SiteFormat, tokens: int) -> int:
    """Bytes on disk of a site in this format, in `model.xml` and `model.bin`.

    What sites that read one tensor share (scaled and rounded forms of it) counts at each of them.
    """
    kind, rows = recipe(format, tokens), format.rows
    layers = _NODE_BYTES[kind] + (_BIAS_BYTES if format.bias else 0)
    columns, scales = format.columns, 0
    if format.weight_bits < 32:
        columns, scales = _groups(format) * _width(format), 4 * rows * _groups(format)
        grouped = _groups(format) > 1
        layers += _SLICE_BYTES if columns > format.columns else 0
        if kind in ("dynamic", "static") and format.weight_bits == 8 and grouped:
            columns, scales = format.columns, 4 * rows  # brought to rows before they are stored
        elif kind in ("dynamic", "static") and format.weight_bits == 4:
            scales = (4 + 2 * _groups(format)) * rows
            layers += _WIDENED_BYTES + (_GROUPED_BYTES if grouped else 0)
        elif kind == "unpacked" and grouped:
            scales = (4 + 2 * _groups(format)) * rows
            layers += _REGROUPED_BYTES
        elif grouped:
            layers += _GROUPED_BYTES
    if format.scaled:
        layers += 4 * format.columns + _SCALED_BYTES
    if format.cache_bits == 8:
        layers += 8 * rows + _CACHE_BYTES
    bias = 4 * rows if format.bias else 0
    return layers + bias + scales + -(-rows * columns * format.weight_bits // 8)


def lower_embedding(site: str, weights: SiteWeights, ids: str, output: str) -> Piece:
    """A table: Gather of a float table or of one that is dequantised where it is gathered."""
    spec, writer = weights.format, Writer(site)
    if weights.weight is not None:
        table = writer.constant("weight", weights.weight)
        writer.node("Gather", [table, ids], output, axis=0)
        return writer.piece
    table = _dequantised(writer, weights)
    if _groups(spec) * _width(spec) == spec.columns:
        writer.node("Gather", [table, ids], output, axis=0)
        return writer.piece
    rows = writer.node("Gather", [table, ids], axis=0)
    bounds = [writer.shape(name, at) for name, at in _bounds(spec.columns, 2)]
    writer.node("Slice", [rows, *bounds], output)
    return writer.piece


def _bounds(columns: int, axis: int) -> tuple[tuple[str, int], ...]:
    return (("start", 0), ("stop", columns), ("axis", axis))


def inputs(readers: Iterable[tuple[str, SiteWeights]], tokens: int) -> OpenVinoInputs:
    """Keeps the forms of tensors that sites read."""
    return OpenVinoInputs()


def lower_linear(
    site: str, weights: SiteWeights, x: str, output: str, tokens: int, inputs: OpenVinoInputs
) -> Piece:
    """A linear layer `(…, columns)` → `(…, rows)`; `inputs` makes what it reads of `x`."""
    kind, writer = recipe(weights.format, tokens), Writer(site)
    if kind == "float":
        assert weights.weight is not None
        matrix = writer.constant("weight", weights.weight.T)
    else:
        if kind == "unpacked":
            rows = _unpacked(writer, weights)
        else:
            rows = _dequantised(writer, weights) if kind == "nbits" else _by_row(writer, weights)
            x = inputs.read(x, weights)
        matrix = writer.node("Transpose", [rows], perm=[1, 0])
    if weights.bias is None:
        writer.node("MatMul", [x, matrix], output)
    else:
        product = writer.node("MatMul", [x, matrix])
        writer.node("Add", [product, writer.constant("bias", weights.bias)], output)
    return writer.piece


def _dequantised(writer: Writer, weights: SiteWeights) -> str:
    """Codes and scales as they are: decompressed by the plugin's kernels. `(rows, columns)`."""
    scales = weights.scales
    assert scales is not None
    matrix = writer.node("Cast", [_codes(writer, weights)], to=TensorProto.FLOAT)
    factors = writer.constant("scales", scales if scales.shape[1] == 1 else scales[:, :, None])
    return _joined(writer, weights.format, writer.node("Mul", [matrix, factors]))


def _by_row(writer: Writer, weights: SiteWeights) -> str:
    """int8 codes with a scale per row, dequantised by the plugin's kernels. `(rows, columns)`."""
    scales = weights.scales
    assert scales is not None
    if scales.shape[1] == 1 and weights.format.weight_bits == 8:
        return _dequantised(writer, weights)
    row_scales = np.abs(weights.dequantised()).max(axis=1) / np.float32(127)
    row_scales = np.where(row_scales > 0, row_scales, np.float32(1)).astype(np.float32)
    if weights.format.weight_bits == 8:
        codes = np.rint(weights.dequantised() / row_scales[:, None]).astype(np.int8)
        rows = writer.integers(codes, 8)
    else:
        with np.errstate(divide="ignore", over="ignore"):
            divisors = (row_scales[:, None] / weights.live_scales()).astype(np.float16)
        rows = _divided(writer, weights, divisors)
        rows = writer.node("Cast", [writer.node("Round", [rows])], to=TensorProto.INT8)
    rows = writer.node("Cast", [rows], to=TensorProto.FLOAT)
    return writer.node("Mul", [rows, writer.constant("scales", row_scales[:, None])])


def _unpacked(writer: Writer, weights: SiteWeights) -> str:
    """A float matrix `(rows, columns)` that is computed from integers when the model is compiled.

    Grouped scales are kept as float16 in proportion to the row's largest. What inputs are scaled
    by is multiplied into the matrix.
    """
    scales = weights.live_scales()
    largest = scales.max(axis=1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore"):
        if scales.shape[1] == 1:
            rows = _divided(writer, weights, (1 / scales).astype(np.float32))
        else:
            rows = _divided(writer, weights, (largest / scales).astype(np.float16))
            rows = writer.node("Div", [rows, writer.constant("scales", 1 / largest)])
        vector = weights.input_scale
        if vector is None:
            return rows
        return writer.node("Div", [rows, writer.constant("channels", 1 / vector)])


def _divided(writer: Writer, weights: SiteWeights, divisors: Array) -> str:
    """Codes over `divisors` `(rows, groups)`, as float `(rows, columns)`; folded."""
    spec = weights.format
    matrix = writer.node("Cast", [_codes(writer, weights)], to=TensorProto.FLOAT)
    divisor = writer.constant("divisors", divisors if _groups(spec) == 1 else divisors[:, :, None])
    if divisors.dtype == np.float16:
        divisor = writer.node("Cast", [divisor], to=TensorProto.FLOAT)
    matrix = _joined(writer, spec, writer.node("Div", [matrix, divisor]))
    if _groups(spec) * _width(spec) == spec.columns:
        return matrix
    bounds = [writer.shape(name, at) for name, at in _bounds(spec.columns, 1)]
    return writer.node("Slice", [matrix, *bounds])


def _codes(writer: Writer, weights: SiteWeights) -> str:
    """Stored codes `(rows, columns)`, or `(rows, groups, width)` where groups have scales."""
    spec, codes = weights.format, weights.codes
    assert codes is not None
    groups, width = _groups(spec), _width(spec)
    if groups == 1:
        return writer.integers(codes, spec.weight_bits)
    padded = np.pad(codes, ((0, 0), (0, groups * width - spec.columns)))
    return writer.integers(padded.reshape(spec.rows, groups, width), spec.weight_bits)


def _joined(writer: Writer, spec: SiteFormat, matrix: str) -> str:
    """Groups side by side again: `(rows, groups · width)`."""
    if _groups(spec) == 1:
        return matrix
    shape = writer.shape("matrix", spec.rows, _groups(spec) * _width(spec))
    return writer.node("Reshape", [matrix, shape])


def lower_attention(
    node: onnx.NodeProto,
    heads: int,
    kv_heads: int,
    cache_scales: tuple[Array, Array] | None = None,
) -> Piece:
    """The attention product, written out unless heads are grouped or masked causally."""
    if cache_scales is not None:
        return lower_rounded(node, heads, kv_heads, cache_scales)
    if heads != kv_heads or attribute(node, "causal") or len(node.output) > 1:
        return _attention_operator(node, heads, kv_heads)
    head_dim, output = int(attribute(node, "head_dim")), node.output[0]
    writer = Writer(output)
    query, key, value = node.input[:3]
    if attribute(node, "flat"):
        split = writer.shape("split", 0, 0, heads, head_dim)
        query, key, value = (writer.node("Reshape", [x, split]) for x in (query, key, value))
        query = writer.node("Transpose", [query], perm=[0, 2, 1, 3])
        key = writer.node("Transpose", [key], perm=[0, 2, 3, 1])
        value = writer.node("Transpose", [value], perm=[0, 2, 1, 3])
    else:
        key = writer.node("Transpose", [key], perm=[0, 1, 3, 2])
    scale = writer.constant("scale", np.float32(attribute(node, "scale")))
    scores = writer.node("Mul", [writer.node("MatMul", [query, key]), scale])
    if len(node.input) > 3:
        scores = writer.node("Add", [scores, node.input[3]])
    shares = writer.node("Softmax", [scores], axis=-1)
    mixed = writer.node("Transpose", [writer.node("MatMul", [shares, value])], perm=[0, 2, 1, 3])
    writer.node("Reshape", [mixed, writer.shape("join", 0, 0, heads * head_dim)], output)
    return writer.piece
