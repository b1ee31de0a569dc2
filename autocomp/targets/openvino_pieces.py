"""Writing OpenVINO's recipes: nodes named after their site, and what linear layers read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocomp.core.activation_grid import static_grid
from autocomp.core.errors import InternalError
from autocomp.targets.storage import Piece, pack_nibbles
from autocomp.targets.weights import Array, SiteWeights

OPENVINO = "org.openvinotoolkit"
"""Operator domain of what ONNX has no operator for."""


class Writer:
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


class OpenVinoInputs:
    """Scaled tensors and tensors rounded to a fixed range, each computed once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, bytes, tuple[float, float] | None], str] = {}
        self._made = Piece()

    def read(self, x: str, weights: SiteWeights) -> str:
        """What the site reads of `x`.

        Raises:
            InternalError: for a static site without a range.
        """
        vector = weights.input_scale
        if vector is not None:
            x = self._once((x, vector.tobytes(), None), lambda w: _scale(w, x, vector))
        if not weights.format.static:
            return x
        limits = weights.input_range
        if limits is None:
            raise InternalError(f"a site that reads {x} is static but has no range")
        return self._once((x, b"", limits), lambda w: _round(w, x, *limits))

    def take(self) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """Nodes and initializers made since the last call."""
        made, self._made = self._made, Piece()
        return made.nodes, made.initializers

    def _once(
        self, key: tuple[str, bytes, tuple[float, float] | None], make: Callable[[Writer], str]
    ) -> str:
        if key not in self._known:
            writer = Writer(f"{key[0]}.read{len(self._known)}")
            self._known[key] = make(writer)
            self._made.nodes += writer.piece.nodes
            self._made.initializers += writer.piece.initializers
        return self._known[key]


def _scale(writer: Writer, x: str, vector: Array) -> str:
    return writer.node("Mul", [x, writer.constant("channels", vector)])


def _round(writer: Writer, x: str, low: float, high: float) -> str:
    """`x` rounded to the 256 levels of a range, zero among them."""
    scale, zero = static_grid(low, high)
    ends = [
        writer.constant("low", np.float32(-zero * scale)),
        writer.constant("high", np.float32((255 - zero) * scale)),
    ]
    return writer.node("FakeQuantize", [x, *ends, *ends], domain=OPENVINO, levels=256)
