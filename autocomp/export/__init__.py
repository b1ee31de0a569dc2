"""The directory a user takes away: one file per format, each verified by reload."""

from __future__ import annotations

from autocomp.core.registry import Registry
from autocomp.export.protocol import Exporter

EXPORTERS: Registry[Exporter] = Registry(
    "exporters",
    {
        "onnx": "autocomp.export.onnx:EXPORTER",
        "huggingface": "autocomp.export.huggingface:EXPORTER",
        "compressed-tensors": "autocomp.export.compressed_tensors:EXPORTER",
    },
)
"""Export formats by name; other packages add theirs under the entry-point group
`autocomp.exporters`."""


def default_format(runtime: str) -> str:
    """The format that a runtime opens: the exporter of its name, else `onnx`."""
    return runtime if runtime in EXPORTERS else "onnx"
