"""How a site's format is written for OpenVINO's CPU plugin: ONNX nodes its frontend reads, bytes.

Measured on AVX512-VNNI, 384 → 1536 → 384 twice, 32 tokens (µs): float 1590, weights decompressed at
every run 1850, 8-bit weights with activations quantised by the plugin in groups of 32 columns 770,
of 128 680, per tensor in a fixed range 560; ONNX's DynamicQuantizeLinear and MatMulInteger run
slower than float (10.9 ms against 7.3 on MiniLM). Hence:

    float      fp32 weights, MatMul + Add
    dynamic    8-bit activations without a range: DequantizeLinear of the weight, which the plugin
               multiplies in integers, each token's columns quantised in groups of its own. That is
               finer than one scale per tensor, which training assumes
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

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocomp.core.errors import InternalError
from autocomp.core.unit import SiteFormat
from autocomp.targets.attention_recipes import lower_attention as _attention_operator
from autocomp.targets.attention_recipes import lower_rotary as lower_rotary
from autocomp.targets.graph import attribute
from autocomp.targets.piece import Piece, pack_nibbles
from autocomp.targets.skeleton_format import OPSET
from autocomp.targets.weights import Array, SiteWeights

Recipe = Literal["float", "dynamic", "static", "unpacked", "nbits", "gather", "gather-integers"]

OPENVINO = "org.openvinotoolkit"
OPSETS: Mapping[str, int] = {"": OPSET, OPENVINO: 1}
"""Operator domain → version, of every lowered graph."""
FEW_TOKENS = 8
"""Below it a linear layer is bound by reading weights: 4-bit weights stay 4-bit in memory."""

_NODE_BYTES: Mapping[str, int] = {
    "float": 1300,
    "dynamic": 2600,
    "static": 2600,
    "unpacked": 2600,
    "nbits": 2600,
    "gather": 1000,
    "gather-integers": 2200,
}
"""The site's layers in `model.xml`, about."""
_WIDENED_BYTES = 3000
"""What widening adds to them."""


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
        return (kind, format.weight_bits, format.group)
    return "float" if kind == "unpacked" else kind


def kernel_class(format: SiteFormat, tokens: int) -> str:
    """The class of kernels that a cost table fits one slope to."""
    kind = recipe(format, tokens)
    return {"unpacked": "float", "gather": "table", "gather-integers": "table"}.get(kind, kind)


def unsupported(format: SiteFormat) -> str | None:
    """Why a format cannot be lowered or would gain nothing, or `None`."""
    if format.weight_bits not in (32, 8, 4):
        return (
            f"stores {format.weight_bits}-bit weights as 4-bit ones, which would be neither "
            "smaller nor faster; available: dense, 8, 4"
        )
    if format.activation_bits not in (32, 8):
        return f"{format.activation_bits}-bit activations have no kernel; available: dense, 8"
    if format.weight_bits == 32 and format.activation_bits == 8:
        return "8-bit activations need 8-bit or 4-bit weights"
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


def _widened(format: SiteFormat, kind: Recipe) -> bool:
    """Whether weights are brought to another grid when the model is compiled."""
    if kind == "unpacked":
        return _groups(format) > 1
    return kind in ("dynamic", "static") and format.weight_bits == 4


def size_bytes(format: SiteFormat, tokens: int) -> int:
    """Bytes on disk of a site in this format, in `model.xml` and `model.bin`."""
    kind, rows = recipe(format, tokens), format.rows
    total = _NODE_BYTES[kind] + (4 * rows if format.bias else 0)
    columns = format.columns
    if format.weight_bits != 32:
        total += 4 * rows
        if _widened(format, kind):
            columns = _groups(format) * _width(format)
            total += 2 * rows * _groups(format) + _WIDENED_BYTES
        elif kind in ("nbits", "gather-integers"):
            columns = _groups(format) * _width(format)
            total += 4 * rows * (_groups(format) - 1)
    return total + -(-rows * columns * format.weight_bits // 8)


class _Writer:
    """A piece under construction; everything in it is named after its site."""

    def __init__(self, site: str) -> None:
        self.site = site
        self.piece = Piece()

    def constant(self, label: str, values: Any) -> str:
        """An initializer."""
        name = f"{self.site}.{label}"
        array = np.ascontiguousarray(values) if np.ndim(values) else np.asarray(values)
        self.piece.initializers.append(numpy_helper.from_array(array, name))
        return name

    def shape(self, label: str, *dims: int) -> str:
        """A shape as an initializer."""
        return self.constant(label, np.array(dims, np.int64))

    def integers(self, codes: Array, bits: int) -> str:
        """int8 or int4 codes as an initializer."""
        if bits == 8:
            return self.constant("codes", codes)
        stored = TensorProto(name=f"{self.site}.codes", data_type=TensorProto.INT4)
        stored.dims.extend(codes.shape)
        stored.raw_data = pack_nibbles((codes.reshape(1, -1) & 15).view(np.uint8)).tobytes()
        self.piece.initializers.append(stored)
        return stored.name

    def node(
        self, operator: str, inputs: Sequence[str], output: str = "", **attributes: Any
    ) -> str:
        """A node; its only output's name."""
        name = output or f"{self.site}.{operator.lower()}{len(self.piece.nodes)}"
        self.piece.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name


def _padded(weights: SiteWeights) -> Array:
    """Codes `(rows, groups · width)`: the last group filled up with zeros."""
    codes, spec = weights.codes, weights.format
    assert codes is not None
    missing = _groups(spec) * _width(spec) - spec.columns
    return np.pad(codes, ((0, 0), (0, missing))) if missing else codes


def lower_embedding(site: str, weights: SiteWeights, ids: str, output: str) -> Piece:
    """A table: Gather of a float table or of one that is dequantised where it is gathered."""
    spec, writer = weights.format, _Writer(site)
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


def input_key(weights: SiteWeights, tokens: int) -> Hashable | None:
    """The range of a static site's input: sites that read one tensor in one range share codes."""
    if recipe(weights.format, tokens) != "static":
        return None
    limits = getattr(weights, "input_range", None)
    if limits is None:
        raise InternalError("a site with static activations was given no range for its input")
    low, high = map(float, limits)
    return (min(low, 0.0), max(high, 0.0))


def quantise_input(x: str, key: Hashable, users: int) -> tuple[Piece, Sequence[str] | None]:
    """FakeQuantize of `x` to 256 levels, zero among them exactly."""
    assert isinstance(key, tuple)
    low, high = key
    scale = (high - low) / 255 or 1.0
    zero = round(-low / scale)
    writer = _Writer(f"{x}.in.{low:.6g}.{high:.6g}")
    ends = [
        writer.constant("low", np.float32(-zero * scale)),
        writer.constant("high", np.float32((255 - zero) * scale)),
    ]
    name = writer.node("FakeQuantize", [x, *ends, *ends], domain=OPENVINO, levels=256)
    return writer.piece, (name,)


def lower_linear(
    site: str,
    weights: SiteWeights,
    x: str,
    output: str,
    tokens: int,
    quantised: Sequence[str] | None,
) -> Piece:
    """A linear layer `(…, columns)` → `(…, rows)`; `quantised` names the rounded form of `x`."""
    kind, writer = recipe(weights.format, tokens), _Writer(site)
    if kind == "float":
        assert weights.weight is not None
        matrix = writer.constant("weight", weights.weight.T)
    else:
        if kind == "unpacked":
            rows = _unpacked(writer, weights)
        elif kind == "nbits":
            rows = _dequantised(writer, weights)
        else:
            rows = _by_row(writer, weights)
        matrix = writer.node("Transpose", [rows], perm=[1, 0])
    x = quantised[0] if quantised else x
    if weights.bias is None:
        writer.node("MatMul", [x, matrix], output)
    else:
        product = writer.node("MatMul", [x, matrix])
        writer.node("Add", [product, writer.constant("bias", weights.bias)], output)
    return writer.piece


def _dequantised(writer: _Writer, weights: SiteWeights) -> str:
    """Codes and scales as they are: decompressed by the plugin's kernels. `(rows, columns)`."""
    scales, spec = weights.scales, weights.format
    assert scales is not None
    codes = writer.integers(_padded(weights), spec.weight_bits)
    if scales.shape[1] == 1:
        inputs = [codes, writer.constant("scales", scales[:, 0])]
        return writer.node("DequantizeLinear", inputs, axis=0)
    inputs = [codes, writer.constant("scales", scales)]
    return writer.node("DequantizeLinear", inputs, axis=1, block_size=_width(spec))


def _by_row(writer: _Writer, weights: SiteWeights) -> str:
    """int8 codes with a scale per row, dequantised by the plugin's kernels. `(rows, columns)`."""
    codes, scales = weights.codes, weights.scales
    assert codes is not None
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
            divisors = (row_scales[:, None] / scales).astype(np.float16)
        rows = _divided(writer, weights, divisors)
        rows = writer.node("Cast", [writer.node("Round", [rows])], to=TensorProto.INT8)
    inputs = [rows, writer.constant("scales", row_scales)]
    return writer.node("DequantizeLinear", inputs, axis=0)


def _unpacked(writer: _Writer, weights: SiteWeights) -> str:
    """A float matrix `(rows, columns)` that is computed from integers when the model is compiled.

    Grouped scales are kept as float16 in proportion to the row's largest.
    """
    scales = weights.scales
    assert scales is not None
    largest = scales.max(axis=1, keepdims=True)
    largest = np.where(largest > 0, largest, np.float32(1)).astype(np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        if scales.shape[1] == 1:
            return _divided(writer, weights, (1 / scales).astype(np.float32))
        rows = _divided(writer, weights, (largest / scales).astype(np.float16))
    return writer.node("Div", [rows, writer.constant("scales", 1 / largest)])


def _divided(writer: _Writer, weights: SiteWeights, divisors: Array) -> str:
    """Codes over `divisors` `(rows, groups)`, as float `(rows, columns)`; folded."""
    spec = weights.format
    rows, groups, width = spec.rows, _groups(spec), _width(spec)
    codes = writer.integers(_padded(weights), spec.weight_bits)
    matrix = writer.node("Cast", [codes], to=TensorProto.FLOAT)
    divisor = writer.constant("divisors", divisors if groups == 1 else divisors[:, :, None])
    if divisors.dtype == np.float16:
        divisor = writer.node("Cast", [divisor], to=TensorProto.FLOAT)
    if groups == 1:
        return writer.node("Div", [matrix, divisor])
    matrix = writer.node("Reshape", [matrix, writer.shape("grouped", rows, groups, width)])
    matrix = writer.node("Div", [matrix, divisor])
    matrix = writer.node("Reshape", [matrix, writer.shape("matrix", rows, groups * width)])
    if groups * width == spec.columns:
        return matrix
    bounds = [writer.shape(name, at) for name, at in _bounds(spec.columns, 1)]
    return writer.node("Slice", [matrix, *bounds])


def lower_attention(node: onnx.NodeProto, heads: int, kv_heads: int) -> Piece:
    """The attention product, written out unless heads are grouped or masked causally."""
    if heads != kv_heads or attribute(node, "causal"):
        return _attention_operator(node, heads, kv_heads)
    head_dim, output = int(attribute(node, "head_dim")), node.output[0]
    writer = _Writer(output)
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
