"""How weights lie in the file, and the nodes that ONNX Runtime folds into plain ones at load.

Everything here is constant: the runtime computes it once, when the session is made, and multiplies
with what it would have found in a larger file, bit for bit. Layouts, of weights in the order of the
`(columns, rows)` matrix that is multiplied with:

    8 bits   int8
    4 bits   int4, two in a byte
    3 bits   8 codes in 3 bytes: the low 2 bits four in a byte, then the signs eight in a byte
    2 bits   four in a byte
    sparse   a bit per weight, true where one is stored, and the stored ones as above, or float32

Bits are looked up half a byte at a time in tables of 16 entries; a sparse matrix is scattered to
where its bits are. What the lookups make along the way stays in memory until the runtime has folded
the whole graph (see docs/design.md), so there are as few and as narrow steps as possible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocomp.core.unit import SiteFormat
from autocomp.targets.weights import Array

NARROW_BITS = (4, 3, 2)
"""Bits of codes that are unpacked at load."""

_CODE_BYTES = {32: 60, 8: 60, 4: 150, 3: 1250, 2: 555}
_SPARSE_BYTES = 1300
"""Names, shapes, tables and attributes of the nodes, about; beside the weights themselves."""


@dataclass
class Piece:
    """Nodes and initializers that stand for one site.

    `values` are shapes of inner tensors that the runtime cannot tell from the operators.
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    values: list[onnx.ValueInfoProto] = field(default_factory=list)


def payload_bits(format: SiteFormat) -> int:
    """Bits of the stored weights of a linear layer, and of the map of where they are."""
    total = format.rows * format.columns
    if format.nonzeros is None:
        return total * format.weight_bits
    return total + format.nonzeros * format.weight_bits


def storage_bytes(format: SiteFormat) -> int:
    """Bytes of a linear layer's weights in the file, with the nodes that unpack them."""
    total = format.rows * format.columns
    nodes = _CODE_BYTES[format.weight_bits]
    stored, bits = total, 0
    if format.nonzeros is not None:
        stored, bits = format.nonzeros, -(-total // 8)
        nodes += _SPARSE_BYTES
    return bits + -(-stored * format.weight_bits // 8) + nodes


def not_smaller(format: SiteFormat) -> str | None:
    """Why a sparse format is no smaller than a dense one of the same bits; `None` if it is."""
    total = format.rows * format.columns
    if format.nonzeros is None or payload_bits(format) < total * format.weight_bits:
        return None
    return (
        f"stores {format.nonzeros / total:.0%} of {format.weight_bits}-bit weights, with a bit for "
        f"each to tell where, in no fewer bytes than all of them; choose a higher level or dense"
    )


class Builder:
    """Writes nodes and initializers of one site into a piece."""

    def __init__(self, piece: Piece, site: str) -> None:
        self.piece = piece
        self.site = site

    def node(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node with one output, whose name is returned."""
        output = f"{self.site}.{operator.lower()}{len(self.piece.nodes)}"
        self.piece.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def constant(self, array: Array, label: str) -> str:
        """An initializer, once per label."""
        name = f"{self.site}.{label}"
        if all(tensor.name != name for tensor in self.piece.initializers):
            self.piece.initializers.append(
                numpy_helper.from_array(np.ascontiguousarray(array), name)
            )
        return name

    def shape(self, dims: Sequence[int], label: str) -> str:
        """A list of integers for Reshape and the like."""
        return self.constant(np.array(dims, np.int64), label)

    def halves(self, values: Array, label: str, kind: int, dims: Sequence[int]) -> str:
        """An INT4 or UINT4 initializer of `values`, two in a byte, the first in the low half."""
        name = f"{self.site}.{label}"
        tensor = TensorProto(name=name, data_type=kind)
        tensor.dims.extend(dims)
        tensor.raw_data = pack_nibbles((values.reshape(-1) & 15).astype(np.uint8)).tobytes()
        self.piece.initializers.append(tensor)
        return name

    def lookup(self, values: Array, label: str, table: Array) -> str:
        """`table[values]` `(n, entries)` for half bytes `values (n,)` and `table (16, entries)`."""
        stored = self.halves(values, label, TensorProto.UINT4, values.shape)
        index = self.node("Cast", [stored], to=TensorProto.INT32)
        return self.node("Gather", [self.constant(table, f"{label}.table"), index])

    def codes(self, codes: Array, bits: int, kind: int) -> str:
        """Integer `codes`, stored in `bits` each, as INT8 or FLOAT of the same shape."""
        if bits == 8:
            stored = self.constant(codes, "codes")
            return stored if kind == TensorProto.INT8 else self.node("Cast", [stored], to=kind)
        if bits == 4:
            stored = self.halves(codes, "codes", TensorProto.INT4, codes.shape)
            return self.node("Cast", [stored], to=kind)
        name = self._narrow(codes, bits)
        return name if kind == TensorProto.INT8 else self.node("Cast", [name], to=kind)

    def _narrow(self, codes: Array, bits: int) -> str:
        """3-bit or 2-bit codes as INT8."""
        flat = codes.reshape(-1)
        padded = np.zeros(-(-flat.size // 4) * 4, np.uint8)
        padded[: flat.size] = flat.view(np.uint8)
        half = np.arange(16)
        pairs = np.stack([half & 3, half >> 2], axis=1)
        if bits == 2:
            pairs = np.where(pairs > 1, pairs - 4, pairs)
        low = (padded & 3).reshape(-1, 2)
        name = self.lookup(low[:, 0] | low[:, 1] << 2, "codes", pairs.astype(np.int8))
        if bits == 3:
            signs = _as_halves((padded >> 2) & 1)
            table = self.lookup(signs, "signs", (_HALF_BITS * -4).astype(np.int8))
            paired = self.node("Reshape", [table, self.shape((-1, 2), "pairs")])
            name = self.node("Add", [name, paired])
        if padded.size != flat.size:
            name = self.node("Reshape", [name, self.shape((-1,), "flat")])
            ends = [self.shape((0,), "first"), self.shape((flat.size,), "last")]
            name = self.node("Slice", [name, *ends])
        return self.node("Reshape", [name, self.shape(codes.shape, "stored")])

    def scatter(self, mask: Array, values: str, kind: int) -> str:
        """The INT8 or FLOAT tensor of `mask`'s shape that holds `values (1, stored)` where true."""
        padded = np.zeros(-(-mask.size // 4) * 4, np.uint8)
        padded[: mask.size] = mask.reshape(-1)
        table = self.lookup(_as_halves(padded), "mask", _HALF_BITS.astype(np.bool_))
        where = self.node("NonZero", [self.node("Reshape", [table, self.shape((-1,), "flat")])])
        # Without its size, which depends on the values, the runtime would not fold the node.
        count = int(np.count_nonzero(mask))
        self.piece.values.append(
            helper.make_tensor_value_info(where, TensorProto.INT64, [1, count])
        )
        zeros = self.node(
            "ConstantOfShape",
            [self.shape((1, mask.size), "size")],
            value=helper.make_tensor("zero", kind, [1], [0]),
        )
        spread = self.node("ScatterElements", [zeros, where, values], axis=1)
        return self.node("Reshape", [spread, self.shape(mask.shape, "whole")])

    def matrix(self, codes: Array, mask: Array | None, bits: int, kind: int) -> str:
        """Integer `codes` `(columns, rows)`, or of another shape, as INT8 or FLOAT."""
        if mask is None:
            return self.codes(codes, bits, kind)
        values = self.codes(codes[mask].reshape(1, -1), bits, TensorProto.INT8)
        name = self.scatter(mask, values, TensorProto.INT8)
        return name if kind == TensorProto.INT8 else self.node("Cast", [name], to=kind)

    def weight(self, weight: Array, mask: Array | None) -> str:
        """Float `weight` `(columns, rows)`."""
        if mask is None:
            return self.constant(weight, "weight")
        values = self.constant(weight[mask].reshape(1, -1), "weight")
        return self.scatter(mask, values, TensorProto.FLOAT)

    def narrowed(self, codes: str, divisors: Array, width: int) -> str:
        """FLOAT `codes (columns, rows)` over `divisors (groups, rows)`, rounded to INT8.

        A group is `width` columns, the last perhaps fewer; halves go to the even number.
        """
        stored = self.constant(divisors.astype(np.float16), "divisors")
        wide = self.node("Cast", [stored], to=TensorProto.FLOAT)
        return self.node(
            "QuantizeLinear",
            [codes, wide],
            axis=0,
            block_size=width,
            output_dtype=TensorProto.INT8,
        )


_HALF_BITS = (np.arange(16)[:, None] >> np.arange(4)) & 1
"""Bits of every half byte, the lowest first, `(16, 4)`."""


def _as_halves(bits: Array) -> Array:
    """Zeros and ones, four of them in every half byte; their number a multiple of four."""
    halves: Array = (bits.reshape(-1, 4) << np.arange(4, dtype=np.uint8)).sum(
        axis=1, dtype=np.uint8
    )
    return halves


def pack_nibbles(values: Array) -> Array:
    """Pairs along the last axis in one byte, the first in the low half; odd ends padded by 0."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], 1), np.uint8)], axis=-1)
    packed: Array = (values[..., 0::2] | (values[..., 1::2] << 4)).astype(np.uint8)
    return packed


def grouped_shape(format: SiteFormat) -> tuple[int, int]:
    """(groups, columns in a group) of a row; one group where a row has one scale."""
    width = format.columns if format.group is None else min(format.group, format.columns)
    return math.ceil(format.columns / width), width
