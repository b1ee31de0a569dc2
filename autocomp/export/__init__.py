"""The directory a user takes away: one file per format, each verified by reload."""

from __future__ import annotations

from autocomp.core.registry import Registry
from autocomp.export.protocol import Exporter
from autocomp.targets.protocol import Artifact

EXPORTERS: Registry[Exporter] = Registry(
    "exporters",
    {
        "onnx": "autocomp.export.artifact:ONNX",
        "openvino": "autocomp.export.artifact:OPENVINO",
        "huggingface": "autocomp.export.huggingface:EXPORTER",
        "compressed-tensors": "autocomp.export.compressed_tensors:EXPORTER",
    },
)
"""Export formats by name; other packages add theirs under the entry-point group
`autocomp.exporters`."""


def own_format(artifact: Artifact) -> str:
    """The export format that is the artifact itself."""
    return "openvino" if artifact.path.suffix == ".xml" else "onnx"
