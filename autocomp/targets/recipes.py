"""How a site's format is written in ONNX for ONNX Runtime's CPU kernels: nodes, bytes, limits.

A *recipe* is chosen from the format and the number of tokens of a run. Measured on AVX512-VNNI,
384 × 384, 32 tokens (µs): float 98, int8 30, MatMulNBits 4-bit 85, 4-bit with float activations
115, 8-bit with float activations 290. Hence:

    float      fp32 weights, MatMul + Add
    int8       8-bit activations: DynamicQuantizeLinear shared by the sites that read one tensor,
               MatMulIntegerToFloat; a scale per row. 4-bit weights with 8-bit activations are
               stored as int4 and widened to int8 rows when the session is made
    unpacked   float activations: integer weights stored, made float when the session is made
               (Cast and Mul of constants are folded): small on disk, as fast as float
    nbits      few tokens (decoding): MatMulNBits, which reads the small weights from memory

`int8` on 4-bit codes rounds code × scale to 1/127 of the row's largest weight: an error some 16
times smaller than that of the 4-bit codes themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocomp.core.unit import SiteFormat
from autocomp.targets.attention_recipes import lower_attention as lower_attention
from autocomp.targets.attention_recipes import lower_rotary as lower_rotary
from autocomp.targets.piece import Piece, pack_nibbles
from autocomp.targets.skeleton_format import OPSET
from autocomp.targets.weights import Array, SiteWeights

Recipe = Literal["float", "int8", "unpacked", "nbits", "gather", "gather-blocks"]

MICROSOFT = "com.microsoft"
OPSETS: Mapping[str, int] = {"": OPSET, MICROSOFT: 1}
"""Operator domain → version, of every lowered graph."""
FEW_TOKENS = 8
"""Below it a linear layer is bound by reading weights: MatMulNBits."""

_BLOCKS = (16, 32, 64, 128, 256)
_NODE_BYTES = {
    "float": 360,
    "int8": 390,
    "unpacked": 920,
    "widened": 1500,
    "nbits": 460,
    "gather": 140,
    "gather-blocks": 340,
}
"""Names, shapes and attributes of a lowered site in the file, about; `widened` is from 4 bits."""


def recipe(format: SiteFormat, tokens: int) -> Recipe:
    """The recipe of a format for runs of `tokens` tokens."""
    if format.embedding:
        return "gather" if format.weight_bits == 32 else "gather-blocks"
    if format.weight_bits == 32:
        return "float"
    if tokens < FEW_TOKENS and _block(format) is not None:
        return "nbits"
    return "int8" if format.activation_bits == 8 else "unpacked"


def kernel(format: SiteFormat, tokens: int) -> Hashable:
    """Equal for formats of one shape that run the same kernels: they are timed once."""
    kind = recipe(format, tokens)
    if kind in ("nbits", "gather-blocks"):
        return (kind, format.weight_bits, format.group, format.activation_bits)
    return "float" if kind == "unpacked" else kind


def kernel_class(format: SiteFormat, tokens: int) -> str:
    """The class of kernels that a cost table fits one slope to."""
    kind = recipe(format, tokens)
    return {"unpacked": "float", "gather": "table", "gather-blocks": "table"}.get(kind, kind)


def unsupported(format: SiteFormat) -> str | None:
    """Why a format cannot be lowered, or `None`."""
    if format.weight_bits not in (32, 8, 4):
        return f"{format.weight_bits}-bit weights have no kernel; available: dense, 8, 4"
    if format.activation_bits not in (32, 8):
        return f"{format.activation_bits}-bit activations have no kernel; available: dense, 8"
    if format.weight_bits == 32:
        if format.activation_bits == 8:
            return "8-bit activations need 8-bit or 4-bit weights"
        return None
    group = format.group or format.columns
    if format.embedding and group < format.columns and (group < 16 or group & (group - 1)):
        return f"an embedding's group must be a power of two of at least 16, not {group}"
    return None


def _block(format: SiteFormat) -> int | None:
    """Block size for MatMulNBits, or `None` if the grouping has none."""
    if format.group in _BLOCKS:
        return format.group
    # One scale per row: repeat it over blocks.
    return 128 if format.group is None else None


def _table_block(format: SiteFormat) -> int:
    """Block size for GatherBlockQuantized: a power of two; one block when a row has one scale."""
    if format.group is not None and format.group < format.columns:
        return format.group
    return max(16, 1 << (format.columns - 1).bit_length())


def _groups(format: SiteFormat) -> int:
    return 1 if format.group is None else -(-format.columns // format.group)


def size_bytes(format: SiteFormat, tokens: int) -> int:
    """Bytes on disk of a site in this format."""
    rows, columns = format.rows, format.columns
    bias = 4 * rows if format.bias else 0
    weights = -(-rows * columns * format.weight_bits // 8)
    kind: str = recipe(format, tokens)
    nodes = _NODE_BYTES[kind]
    match kind:
        case "float" | "gather":
            scales = 0
        case "gather-blocks":
            scales = 4 * rows * _groups(format)
        case "int8":
            scales = 4 * rows
            if format.weight_bits == 4:
                scales += 2 * rows * _groups(format)
                nodes = _NODE_BYTES["widened"]
        case "unpacked":
            scales = 4 * rows
            if _groups(format) > 1:
                scales += 2 * rows * _groups(format)
                nodes = _NODE_BYTES["widened"]
        case "nbits":
            block = _block(format)
            assert block is not None
            blocks = -(-columns // block)
            weights = rows * blocks * block * format.weight_bits // 8
            scales = 4 * rows * blocks
        case _:
            raise AssertionError(kind)
    return weights + scales + bias + nodes


def lower_embedding(site: str, weights: SiteWeights, ids: str, output: str) -> Piece:
    """A table: Gather, or GatherBlockQuantized. `(B, T)` → `(B, T, columns)`."""
    spec = weights.format
    if spec.weight_bits == 32:
        assert weights.weight is not None
        return Piece(
            [helper.make_node("Gather", [f"{site}.weight", ids], [output], axis=0)],
            [numpy_helper.from_array(np.ascontiguousarray(weights.weight), f"{site}.weight")],
        )
    assert weights.codes is not None
    assert weights.scales is not None
    offset = 1 << (spec.weight_bits - 1)
    codes = (weights.codes.astype(np.int16) + offset).astype(np.uint8)
    if spec.weight_bits == 4:
        codes = pack_nibbles(codes)
    node = helper.make_node(
        "GatherBlockQuantized",
        [f"{site}.codes", ids, f"{site}.scales"],
        [output],
        domain=MICROSOFT,
        bits=spec.weight_bits,
        block_size=_table_block(spec),
        gather_axis=0,
        quantize_axis=1,
    )
    return Piece(
        [node],
        [
            numpy_helper.from_array(codes, f"{site}.codes"),
            numpy_helper.from_array(np.ascontiguousarray(weights.scales), f"{site}.scales"),
        ],
    )


class Inputs:
    """Codes, scale and zero point of tensors at run time; a single reader computes its own."""

    def __init__(self, integer_readers: Iterable[tuple[str, SiteWeights]]) -> None:
        self._uses = Counter(x for x, _ in integer_readers)
        self._codes: dict[str, tuple[str, str, str]] = {}
        self._nodes: list[onnx.NodeProto] = []

    def codes(self, x: str) -> tuple[str, str, str] | None:
        """Their names, or `None` where the layer shall quantise by itself."""
        if self._uses[x] > 1 and x not in self._codes:
            self._codes[x] = (f"{x}.codes", f"{x}.scale", f"{x}.zero")
            self._nodes.append(helper.make_node("DynamicQuantizeLinear", [x], self._codes[x]))
        return self._codes.get(x)

    def take(self) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """Nodes made since the last call."""
        made, self._nodes = self._nodes, []
        return made, []


def inputs(readers: Iterable[tuple[str, SiteWeights]], tokens: int) -> Inputs:
    """All `int8` sites that read one tensor share its codes."""
    return Inputs((x, w) for x, w in readers if recipe(w.format, tokens) == "int8")


def lower_linear(
    site: str, weights: SiteWeights, x: str, output: str, tokens: int, inputs: Inputs
) -> Piece:
    """A linear layer `(…, columns)` → `(…, rows)`; `inputs` makes what it reads of `x`."""
    kind = recipe(weights.format, tokens)
    if kind == "int8":
        return _int8(site, weights, x, output, inputs.codes(x))
    if kind == "nbits":
        return _nbits(site, weights, x, output)
    piece = Piece()
    if kind == "float":
        assert weights.weight is not None
        matrix = f"{site}.weight"
        piece.initializers.append(
            numpy_helper.from_array(np.ascontiguousarray(weights.weight.T), matrix)
        )
    else:
        matrix = _unpacked(piece, site, weights)
    product = f"{site}.product" if weights.bias is not None else output
    piece.nodes.append(helper.make_node("MatMul", [x, matrix], [product]))
    if weights.bias is not None:
        piece.initializers.append(numpy_helper.from_array(weights.bias, f"{site}.bias"))
        piece.nodes.append(helper.make_node("Add", [product, f"{site}.bias"], [output]))
    return piece


def _int8(
    site: str,
    weights: SiteWeights,
    x: str,
    output: str,
    quantised: Sequence[str] | None,
) -> Piece:
    codes, scales = weights.codes, weights.scales
    assert codes is not None
    assert scales is not None
    piece = Piece()
    if scales.shape[1] > 1 or weights.format.weight_bits == 4:
        row_scales = np.abs(weights.dequantised()).max(axis=1) / np.float32(127)
        row_scales = np.where(row_scales > 0, row_scales, np.float32(1)).astype(np.float32)
        if weights.format.weight_bits == 8:
            codes = np.rint(weights.dequantised() / row_scales[:, None]).astype(np.int8)
            matrix = _matrix(piece, site, codes)
        else:
            ratios = (scales / row_scales[:, None]).astype(np.float16)
            matrix = _widened(piece, site, weights, ratios, TensorProto.INT8)
    else:
        row_scales = np.ascontiguousarray(scales[:, 0])
        matrix = _matrix(piece, site, codes)
    piece.initializers.append(numpy_helper.from_array(row_scales, f"{site}.scales"))
    bias = ""
    if weights.bias is not None:
        bias = f"{site}.bias"
        piece.initializers.append(numpy_helper.from_array(weights.bias, bias))
    if quantised is None:
        inputs = [x, matrix, f"{site}.scales", "", bias]
        operator = "DynamicQuantizeMatMul"
    else:
        shared, scale, zero = quantised
        inputs = [shared, matrix, scale, f"{site}.scales", zero, "", bias]
        operator = "MatMulIntegerToFloat"
    while not inputs[-1]:
        inputs.pop()
    piece.nodes.append(helper.make_node(operator, inputs, [output], domain=MICROSOFT))
    return piece


def _matrix(piece: Piece, site: str, codes: Array) -> str:
    """int8 codes as `(columns, rows)`."""
    name = f"{site}.codes"
    piece.initializers.append(numpy_helper.from_array(np.ascontiguousarray(codes.T), name))
    return name


def _unpacked(piece: Piece, site: str, weights: SiteWeights) -> str:
    """A float `(columns, rows)` matrix that the runtime makes from stored integers at load."""
    scales = weights.scales
    assert scales is not None
    if scales.shape[1] == 1:
        return _widened(piece, site, weights, scales, TensorProto.FLOAT)
    # float16 in proportion to the row's largest scale: no scale is too small for it.
    largest = scales.max(axis=1)
    largest = np.where(largest > 0, largest, np.float32(1)).astype(np.float32)
    factors = (scales / largest[:, None]).astype(np.float16)
    matrix = _widened(piece, site, weights, factors, TensorProto.FLOAT)
    piece.initializers.append(numpy_helper.from_array(largest, f"{site}.scales"))
    piece.nodes.append(helper.make_node("Mul", [matrix, f"{site}.scales"], [f"{site}.weight"]))
    return f"{site}.weight"


def _widened(piece: Piece, site: str, weights: SiteWeights, factors: Array, to: int) -> str:
    """Stored codes × `factors` `(rows, groups)`, as float or rounded to int8, `(columns, rows)`.

    All of it is constant: the runtime computes it once, when the session is made.
    """
    spec, codes = weights.format, weights.codes
    assert codes is not None
    rows, columns, groups = spec.rows, spec.columns, factors.shape[1]
    width = -(-columns // groups) if spec.group is None else min(spec.group, columns)
    padded = groups * width
    transposed = np.zeros((padded, rows), np.int8)
    transposed[:columns] = codes.T
    if spec.weight_bits == 4:
        stored = TensorProto(name=f"{site}.codes", data_type=TensorProto.INT4)
        stored.dims.extend(transposed.shape)
        stored.raw_data = pack_nibbles((transposed.reshape(1, -1) & 15).view(np.uint8)).tobytes()
    else:
        stored = numpy_helper.from_array(transposed, f"{site}.codes")
    factor = np.ascontiguousarray(factors.T.reshape(groups, 1, rows))
    piece.initializers += [stored, numpy_helper.from_array(factor, f"{site}.factors")]
    name = f"{site}.codes"

    def node(operator: str, inputs: list[str], **attributes: Any) -> str:
        output = f"{site}.{operator.lower()}{len(piece.nodes)}"
        piece.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def shape(dims: Sequence[int], label: str) -> str:
        piece.initializers.append(
            numpy_helper.from_array(np.array(dims, np.int64), f"{site}.{label}")
        )
        return f"{site}.{label}"

    name = node("Cast", [name], to=TensorProto.FLOAT)
    factor_name = f"{site}.factors"
    if factor.dtype == np.float16:
        factor_name = node("Cast", [factor_name], to=TensorProto.FLOAT)
    if groups > 1:
        grouped = shape((groups, width, rows), "grouped")
        name = node("Reshape", [name, grouped])
    name = node("Mul", [name, factor_name])
    if to == TensorProto.INT8:
        name = node("Round", [name])
        name = node("Cast", [name], to=TensorProto.INT8)
    name = node("Reshape", [name, shape((padded, rows), "matrix")])
    if padded == columns:
        return name
    return node(
        "Slice", [name, shape((0,), "start"), shape((columns,), "stop"), shape((0,), "axis")]
    )


def _nbits(site: str, weights: SiteWeights, x: str, output: str) -> Piece:
    spec, codes, scales = weights.format, weights.codes, weights.scales
    assert codes is not None
    assert scales is not None
    block = _block(spec)
    assert block is not None
    bits, rows, columns = spec.weight_bits, spec.rows, spec.columns
    blocks = -(-columns // block)
    offset = 1 << (bits - 1)
    padded = np.full((rows, blocks * block), offset, np.uint8)
    padded[:, :columns] = (codes.astype(np.int16) + offset).astype(np.uint8)
    packed = (pack_nibbles(padded) if bits == 4 else padded).reshape(rows, blocks, -1)
    if spec.group is None:
        scales = np.repeat(scales, blocks, axis=1)
    names = [f"{site}.codes", f"{site}.scales"]
    piece = Piece(
        [],
        [
            numpy_helper.from_array(packed, names[0]),
            numpy_helper.from_array(np.ascontiguousarray(scales), names[1]),
        ],
    )
    inputs = [x, *names]
    if weights.bias is not None:
        piece.initializers.append(numpy_helper.from_array(weights.bias, f"{site}.bias"))
        inputs += ["", "", f"{site}.bias"]
    piece.nodes.append(
        helper.make_node(
            "MatMulNBits",
            inputs,
            [output],
            domain=MICROSOFT,
            K=columns,
            N=rows,
            bits=bits,
            block_size=block,
            accuracy_level=4 if spec.activation_bits == 8 else 1,
        )
    )
    return piece
