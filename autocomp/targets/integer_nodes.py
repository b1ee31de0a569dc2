"""The nodes of ONNX Runtime's integer recipes, which `recipes` chooses between and describes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from autocomp.core.unit import SiteFormat
from autocomp.targets.attention_recipes import MICROSOFT
from autocomp.targets.storage import Builder, Piece, grouped_shape, pack_nibbles
from autocomp.targets.weights import SiteWeights

BLOCKS = (16, 32, 64, 128, 256)
"""Sizes that MatMulNBits has kernels for."""


def block_size(format: SiteFormat) -> int | None:
    """Block size for MatMulNBits, or `None` if the grouping has none."""
    if format.group in BLOCKS:
        return format.group
    # One scale per row: repeat it over blocks.
    return 128 if format.group is None else None


def int8(
    site: str,
    weights: SiteWeights,
    x: str,
    output: str,
    quantised_input: Sequence[str] | None,
) -> Piece:
    """8-bit activations: MatMulIntegerToFloat on codes, scale and zero point that sites share, or
    DynamicQuantizeMatMul on `x` itself.
    """
    codes, scales, bits = weights.codes, weights.scales, weights.format.weight_bits
    assert codes is not None
    assert scales is not None
    piece = Piece()
    build = Builder(piece, site)
    mask = None if weights.mask is None else weights.mask.T
    if scales.shape[1] == 1:
        row_scales = np.ascontiguousarray(scales[:, 0])
        matrix = build.matrix(codes.T, mask, bits, TensorProto.INT8)
    else:
        whole = weights.dequantised()
        row_scales = np.abs(whole).max(axis=1) / np.float32(127)
        row_scales = np.where(row_scales > 0, row_scales, np.float32(1)).astype(np.float32)
        if bits == 8:
            codes = np.rint(whole / row_scales[:, None]).astype(np.int8)
            matrix = build.matrix(codes.T, mask, bits, TensorProto.INT8)
        else:
            # Beyond float16's range are groups that vanish beside the row's largest weight.
            with np.errstate(divide="ignore", over="ignore"):
                divisors = (row_scales[:, None] / weights.live_scales()).astype(np.float16).T
            wide = build.matrix(codes.T, mask, bits, TensorProto.FLOAT)
            matrix = build.narrowed(wide, divisors, grouped_shape(weights.format)[1])
    piece.initializers.append(numpy_helper.from_array(row_scales, f"{site}.scales"))
    bias = ""
    if weights.bias is not None:
        bias = f"{site}.bias"
        piece.initializers.append(numpy_helper.from_array(weights.bias, bias))
    if quantised_input is None:
        inputs = [x, matrix, f"{site}.scales", "", bias]
        operator = "DynamicQuantizeMatMul"
    else:
        quantised, scale, zero = quantised_input
        inputs = [quantised, matrix, scale, f"{site}.scales", zero, "", bias]
        operator = "MatMulIntegerToFloat"
    while not inputs[-1]:
        inputs.pop()
    piece.nodes.append(helper.make_node(operator, inputs, [output], domain=MICROSOFT))
    return piece


def unpacked(piece: Piece, site: str, weights: SiteWeights) -> str:
    """A float `(columns, rows)` matrix that the runtime makes from stored integers at load."""
    codes, scales, spec = weights.codes, weights.scales, weights.format
    assert codes is not None
    assert scales is not None
    build = Builder(piece, site)
    codes, mask = codes.T, None if weights.mask is None else weights.mask.T
    rows, columns = spec.rows, spec.columns
    if scales.shape[1] == 1:
        wide = build.matrix(codes, mask, spec.weight_bits, TensorProto.FLOAT)
        matrix = build.node("Mul", [wide, build.constant(scales[:, 0], "scales")])
        return _on_plain_inputs(build, weights, matrix)
    groups, width = grouped_shape(spec)
    padding = ((0, groups * width - columns), (0, 0))
    shape = (groups, width, rows)
    codes = np.pad(codes, padding).reshape(shape)
    mask = None if mask is None else np.pad(mask, padding).reshape(shape)
    # float16 in proportion to the row's largest scale: no scale is too small for it.
    scales = weights.live_scales()
    largest = scales.max(axis=1)
    shares = (scales / largest[:, None]).astype(np.float16).T.reshape(groups, 1, rows)
    share = build.node("Cast", [build.constant(shares, "shares")], to=TensorProto.FLOAT)
    factor = build.node("Mul", [share, build.constant(largest, "scales")])
    wide = build.matrix(codes, mask, spec.weight_bits, TensorProto.FLOAT)
    scaled = build.node("Mul", [wide, factor])
    matrix = build.node("Reshape", [scaled, build.shape((groups * width, rows), "matrix")])
    if groups * width != columns:
        ends = [build.shape((0,), "start"), build.shape((columns,), "stop")]
        matrix = build.node("Slice", [matrix, *ends])
    return _on_plain_inputs(build, weights, matrix)


def _on_plain_inputs(build: Builder, weights: SiteWeights, matrix: str) -> str:
    """`matrix (columns, rows)` with the vector of scaled inputs multiplied in, also at load."""
    if weights.input_scale is None:
        return matrix
    return build.node("Mul", [matrix, build.constant(weights.input_scale[:, None], "channels")])


def nbits(site: str, weights: SiteWeights, x: str, output: str) -> Piece:
    """MatMulNBits, which reads packed codes with a scale for every block of a row."""
    spec, codes, scales = weights.format, weights.codes, weights.scales
    assert codes is not None
    assert scales is not None
    block = block_size(spec)
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
