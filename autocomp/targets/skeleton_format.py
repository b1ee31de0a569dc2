"""Names that the exporter of skeletons and the lowering of them agree on. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autocomp.core.unit import SiteFormat
from autocomp.targets.graph import attribute

if TYPE_CHECKING:
    import onnx

DOMAIN = "autocomp"
"""Operator domain of the markers: `Linear`, `Embedding`, `Attention`, `RotaryEmbedding`, `Tokens`,
`AveragedTokens`."""

OPSET = 23
"""The first opset with Attention, RotaryEmbedding and RMSNormalization as operators."""

VERSION = 4
"""Raised when skeletons written earlier must not be used any more."""


def dense_formats(skeleton: onnx.ModelProto) -> dict[str, SiteFormat]:
    """Site → dense format of every linear and embedding marker, in graph order."""
    return {
        str(attribute(node, "site")): SiteFormat(
            int(attribute(node, "rows")),
            int(attribute(node, "columns")),
            bool(attribute(node, "bias")),
            embedding=node.op_type == "Embedding",
        )
        for node in skeleton.graph.node
        if node.domain == DOMAIN and node.op_type in ("Linear", "Embedding")
    }
