"""What linear layers read: scaled and quantised forms of a tensor, each computed once.

Sites that read one tensor share its scaled form when their vectors are equal, and its codes when
scaled form and range are. A range that was fixed at calibration becomes QuantizeLinear with
constants; one found at run time DynamicQuantizeLinear, which a site that reads alone has fused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from autocomp.core.activation_grid import static_grid
from autocomp.core.errors import InternalError
from autocomp.targets.weights import SiteWeights

Codes = tuple[str, str, str]
"""Names of the codes, scale and zero point of a tensor."""

_Key = tuple[str, bytes, tuple[float, float] | None]


class Inputs:
    """The forms of tensors that sites read. Nodes and initializers are collected as asked for."""

    def __init__(self, integer_readers: Iterable[tuple[str, SiteWeights]]) -> None:
        """`integer_readers`: tensor and weights of every site that multiplies integers."""
        self._uses = Counter(_key(x, weights) for x, weights in integer_readers)
        self._scaled: dict[tuple[str, bytes], str] = {}
        self._codes: dict[_Key, Codes] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def scaled(self, x: str, weights: SiteWeights) -> str:
        """The tensor the site reads: `x`, times its vector where the format is scaled."""
        if weights.input_scale is None:
            return x
        key = (x, weights.input_scale.tobytes())
        if key not in self._scaled:
            number = sum(tensor == x for tensor, _ in self._scaled)
            output, vector = f"{x}.scaled{number}", f"{x}.channels{number}"
            self._constant(vector, weights.input_scale)
            self.nodes.append(helper.make_node("Mul", [x, vector], [output]))
            self._scaled[key] = output
        return self._scaled[key]

    def codes(self, x: str, weights: SiteWeights) -> Codes | None:
        """8-bit codes of what the site reads of `x`; `None` where it shall quantise by itself."""
        key = _key(x, weights)
        if key in self._codes:
            return self._codes[key]
        if not weights.format.static and self._uses[key] < 2:
            return None
        source = self.scaled(x, weights)
        if weights.format.static:
            number = sum(
                codes.startswith(f"{source}.static") for codes, _, _ in self._codes.values()
            )
            stem = f"{source}.static{number}"
            names = (f"{stem}.codes", f"{stem}.scale", f"{stem}.zero")
            if weights.input_range is None:
                raise InternalError(f"a site that reads {x} is static but has no range")
            scale, zero_point = static_grid(*weights.input_range)
            self._constant(names[1], np.array(scale, np.float32))
            self._constant(names[2], np.array(zero_point, np.uint8))
            node = helper.make_node("QuantizeLinear", [source, *names[1:]], names[:1])
        else:
            names = (f"{source}.codes", f"{source}.scale", f"{source}.zero")
            node = helper.make_node("DynamicQuantizeLinear", [source], names)
        self.nodes.append(node)
        self._codes[key] = names
        return names

    def take(self) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """Nodes and initializers made since the last call."""
        made = (self.nodes, self.initializers)
        self.nodes, self.initializers = [], []
        return made

    def _constant(
        self, name: str, value: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
    ) -> None:
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))


def _key(x: str, weights: SiteWeights) -> _Key:
    vector = b"" if weights.input_scale is None else weights.input_scale.tobytes()
    return (x, vector, weights.input_range if weights.format.static else None)
