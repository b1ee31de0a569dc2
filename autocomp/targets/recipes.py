"""How a site's format is written in ONNX for ONNX Runtime's CPU kernels: nodes, bytes, limits.

A *recipe* is chosen from the format and the number of tokens of a run. Measured on AVX512-VNNI,
384 × 384, 32 tokens (µs): float 98, int8 30, MatMulNBits 4-bit 85, 4-bit with float activations
115, 8-bit with float activations 290. Hence:

    float      fp32 weights, MatMul + Add
    int8       8-bit activations: DynamicQuantizeLinear (QuantizeLinear where the range is fixed)
               shared by the sites that read one tensor, MatMulIntegerToFloat; a scale per row.
               Fewer bits are stored as such and widened to int8 rows when the session is made
    unpacked   float activations: integer weights stored, made float when the session is made:
               small on disk, as fast as float
    nbits      a single token (decoding): MatMulNBits, which reads the small weights from memory

One token, a chain of layers of 192 / 768 / 2048 columns, µs a layer: float 3.2 / 36 / 592; 8 bits,
8-bit activations: int8 3.3 / 14 / 139, nbits 2.9 / 12 / 92; 4 bits, likewise: widened to int8
3.9 / 17 / 136, nbits by groups of 32 4.2 / 20 / 133, of 128 3.2 / 12 / 78; 4 bits, float
activations: nbits 5.0 / 46 / 364; 8 bits, float activations: nbits 47 / 1280 / 10500, therefore
unpacked. From two tokens on nbits is no faster than int8 and, with float activations, three times
slower than unpacked. In a prompt of 128 tokens, 768 columns, nbits takes 1000 µs, int8 470.

Scaled inputs are multiplied by their vector first, once for the sites that share it; `unpacked`
multiplies the weight instead, as the session is made.

How fewer than 8 bits, and sparse weights, are stored and unpacked at load is in `storage`.

`int8` on 4-bit codes rounds code × scale to 1/127 of the row's largest weight: an error some 16
times smaller than that of the 4-bit codes themselves.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Literal

import numpy as np
from onnx import helper, numpy_helper

from autocomp.core.unit import SiteFormat
from autocomp.targets.attention_recipes import MICROSOFT, lower_attention, lower_rotary
from autocomp.targets.inputs import Inputs
from autocomp.targets.integer_nodes import block_size, int8, nbits, unpacked
from autocomp.targets.skeleton_format import OPSET
from autocomp.targets.storage import (
    NARROW_BITS,
    Builder,
    Piece,
    not_smaller,
    pack_nibbles,
    storage_bytes,
)
from autocomp.targets.weights import SiteWeights

__all__ = [
    "FEW_TOKENS",
    "MICROSOFT",
    "OPSETS",
    "Piece",
    "Recipe",
    "inputs",
    "kernel",
    "kernel_class",
    "lower_attention",
    "lower_embedding",
    "lower_linear",
    "lower_rotary",
    "recipe",
    "size_bytes",
    "unsupported",
]

Recipe = Literal["float", "int8", "unpacked", "nbits", "gather", "gather-blocks"]

OPSETS: Mapping[str, int] = {"": OPSET, MICROSOFT: 1}
"""Operator domain → version, of every lowered graph."""
FEW_TOKENS = 2
"""Below it a linear layer is bound by reading weights: MatMulNBits."""

_NODE_BYTES = {
    "float": 215,
    "int8": 245,
    "unpacked": 380,
    "nbits": 460,
    "gather": 140,
    "gather-blocks": 340,
}
"""Names, shapes and attributes of a lowered site in the file, about, unpacking aside."""

_GROUPED_BYTES = {"int8": 350, "unpacked": 450}
_SCALED_BYTES, _STATIC_BYTES, _CACHE_BYTES = 150, 200, 400
"""Of the nodes and constants that scale inputs, that quantise them to a fixed range, that write a
cache of int8; about."""


def recipe(format: SiteFormat, tokens: int) -> Recipe:
    """The recipe of a format for runs of `tokens` tokens."""
    if format.embedding:
        return "gather" if format.weight_bits == 32 else "gather-blocks"
    if format.weight_bits == 32:
        return "float"
    packed = format.weight_bits in (8, 4) and format.nonzeros is None and not format.static
    slow = format.weight_bits == 8 and format.activation_bits == 32
    if tokens < FEW_TOKENS and packed and not slow and block_size(format) is not None:
        return "nbits"
    return "int8" if format.activation_bits == 8 else "unpacked"


def kernel(format: SiteFormat, tokens: int) -> Hashable:
    """Equal for formats of one shape that run the same kernels: they are timed once."""
    kind = recipe(format, tokens)
    if kind in ("nbits", "gather-blocks"):
        return (kind, format.weight_bits, format.group, format.activation_bits, format.scaled)
    if kind == "int8":
        return (kind, format.static, format.scaled)
    return "float" if kind == "unpacked" else kind


def kernel_class(format: SiteFormat, tokens: int) -> str:
    """The class of kernels that a cost table fits one slope to."""
    kind = recipe(format, tokens)
    return {"unpacked": "float", "gather": "table", "gather-blocks": "table"}.get(kind, kind)


def inputs(readers: Iterable[tuple[str, SiteWeights]], tokens: int) -> Inputs:
    """What integer sites share of the tensors they read."""
    return Inputs((x, w) for x, w in readers if recipe(w.format, tokens) == "int8")


def unsupported(format: SiteFormat, tokens: int = FEW_TOKENS) -> str | None:
    """Why a format cannot be lowered for runs of `tokens` tokens, or `None`."""
    bits = format.weight_bits
    if bits not in (32, 8, *NARROW_BITS):
        return f"{bits}-bit weights have no kernel; available: dense, 8, 4, 3, 2"
    if format.activation_bits not in (32, 8):
        return f"{format.activation_bits}-bit activations have no kernel; available: dense, 8"
    if format.static and format.activation_bits != 8:
        return "a static range needs 8-bit activations"
    if format.cache_bits not in (32, 8):
        return f"a cache of {format.cache_bits} bits has no kernel; available: dense, 8"
    if bits == 32 and format.scaled:
        return "scaled inputs need quantised weights"
    if bits == 32 and format.activation_bits == 8:
        return f"8-bit activations need weights of {', '.join(map(str, (8, *NARROW_BITS)))} bits"
    if format.embedding:
        return _unsupported_table(format)
    if tokens < FEW_TOKENS and bits != 32 and (bits < 4 or format.nonzeros is not None):
        what = f"{bits}-bit" if bits < 4 else "sparse"
        return (
            f"reads weights packed as they are stored at fewer than {FEW_TOKENS} tokens a run, and "
            f"has no kernel for {what} ones; available there: dense, 8, 4"
        )
    return not_smaller(format)


def _unsupported_table(format: SiteFormat) -> str | None:
    if format.nonzeros is not None:
        return "looks rows of a table up as they are stored; sparse tables have no kernel"
    if format.weight_bits < 4:
        return (
            f"looks rows of a table up as they are stored; {format.weight_bits}-bit ones have no "
            f"kernel; available: dense, 8, 4"
        )
    group = format.group or format.columns
    grouped = format.weight_bits != 32 and group < format.columns
    if grouped and (group < 16 or group & (group - 1)):
        return f"an embedding's group must be a power of two of at least 16, not {group}"
    return None


def _table_block(format: SiteFormat) -> int:
    """Block size for GatherBlockQuantized: a power of two; one block when a row has one scale."""
    if format.group is not None and format.group < format.columns:
        return format.group
    return max(16, 1 << (format.columns - 1).bit_length())


def _groups(format: SiteFormat) -> int:
    return 1 if format.group is None else -(-format.columns // format.group)


def size_bytes(format: SiteFormat, tokens: int) -> int:
    """Bytes on disk of a site in this format.

    A vector that scales inputs counts at every site that reads them, though sites share it and
    norms take it over: the file may be that much smaller.
    """
    rows, columns = format.rows, format.columns
    bias = 4 * rows if format.bias else 0
    kind = recipe(format, tokens)
    size = bias + _NODE_BYTES[kind]
    if format.scaled:
        size += 4 * columns + _SCALED_BYTES
    if format.static:
        size += _STATIC_BYTES
    if format.cache_bits == 8:
        size += 4 * rows + _CACHE_BYTES
    groups = _groups(format)
    match kind:
        case "float":
            size += storage_bytes(format)
        case "gather":
            size += 4 * rows * columns
        case "gather-blocks":
            size += -(-rows * columns * format.weight_bits // 8) + 4 * rows * groups
        case "int8" | "unpacked":
            size += storage_bytes(format) + 4 * rows
            if groups > 1 and (kind == "unpacked" or format.weight_bits in NARROW_BITS):
                size += 2 * rows * groups + _GROUPED_BYTES[kind]
        case "nbits":
            block = block_size(format)
            assert block is not None
            blocks = -(-columns // block)
            size += rows * blocks * block * format.weight_bits // 8 + 4 * rows * blocks
    return size


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


def lower_linear(
    site: str,
    weights: SiteWeights,
    x: str,
    output: str,
    tokens: int,
    inputs: Inputs,
) -> Piece:
    """A linear layer `(…, columns)` → `(…, rows)`; `inputs` makes what it reads of `x`."""
    kind = recipe(weights.format, tokens)
    if kind == "int8":
        codes = inputs.codes(x, weights)
        return int8(site, weights, inputs.scaled(x, weights), output, codes)
    if kind == "nbits":
        return nbits(site, weights, inputs.scaled(x, weights), output)
    piece = Piece()
    if kind == "float":
        assert weights.weight is not None
        mask = None if weights.mask is None else weights.mask.T
        matrix = Builder(piece, site).weight(weights.weight.T, mask)
    else:
        matrix = unpacked(piece, site, weights)
    product = f"{site}.product" if weights.bias is not None else output
    piece.nodes.append(helper.make_node("MatMul", [x, matrix], [product]))
    if weights.bias is not None:
        piece.initializers.append(numpy_helper.from_array(weights.bias, f"{site}.bias"))
        piece.nodes.append(helper.make_node("Add", [product, f"{site}.bias"], [output]))
    return piece
