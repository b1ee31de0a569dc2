"""Names that the exporter of skeletons and the lowering of them agree on. No torch."""

from __future__ import annotations

DOMAIN = "autocomp"
"""Operator domain of the markers: `Linear`, `Embedding`, `Attention`, `RotaryEmbedding`."""

OPSET = 23
"""The first opset with Attention, RotaryEmbedding and RMSNormalization as operators."""

VERSION = 1
"""Raised when skeletons written earlier must not be used any more."""
