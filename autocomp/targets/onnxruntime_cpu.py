"""ONNX Runtime on the CPU. The only file that imports onnxruntime, besides `rerun`; torch and
onnx on demand.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnxruntime

from autocomp.core.errors import StorageError
from autocomp.core.files import write_atomic
from autocomp.targets.load_memory import ONNX_RUNTIME
from autocomp.targets.protocol import Artifact
from autocomp.targets.runtime import Array, CpuTarget, Session

if TYPE_CHECKING:
    import onnx

    from autocomp.targets.lower import Recipes

_PROTOBUF_LIMIT = 2_000_000_000


def open_session(model: Path | bytes, threads: int) -> onnxruntime.InferenceSession:
    """A session as a deployment opens it: default optimisations, `threads` intra-op threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class OnnxRuntimeTarget(CpuTarget):
    """A model as an ONNX graph in ONNX Runtime on this machine's CPU."""

    name = "onnxruntime-cpu"
    summary = "ONNX Runtime on the CPU: float32, int8, 8-bit and 4-bit weights in one graph"
    lowering_version = 2
    loading = ONNX_RUNTIME

    @property
    def recipes(self) -> Recipes:
        """See `recipes`."""
        from autocomp.targets import recipes

        return recipes

    def runtime(self) -> str:
        """Name and version."""
        return f"onnxruntime {onnxruntime.__version__}"

    def open(self, model: Path | onnx.ModelProto) -> Session:
        """See `open_session`."""
        source = model if isinstance(model, Path) else model.SerializeToString()
        session: Session = open_session(source, self.workload.threads)
        return session

    def anchor(self) -> tuple[onnx.ModelProto, Mapping[str, Array]]:
        """See `anchor`."""
        from autocomp.targets.anchor import anchor_inputs, anchor_model

        return anchor_model(), anchor_inputs()

    def write(self, lowered: onnx.ModelProto, directory: Path) -> Artifact:
        """`model.onnx` in `directory`, with `model.onnx.data` beside it above 2 GB.

        Raises:
            StorageError: if the disk refuses; nothing partial is left under the final name.
        """
        import onnx

        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "model.onnx"
        if sum(len(tensor.raw_data) for tensor in lowered.graph.initializer) < _PROTOBUF_LIMIT:
            write_atomic(path, lambda temporary: _write_bytes(temporary, lowered))
            return Artifact(path, path.stat().st_size)
        try:
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                onnx.save(
                    lowered,
                    Path(scratch) / path.name,
                    save_as_external_data=True,
                    location=f"{path.name}.data",
                )
                for name in (f"{path.name}.data", path.name):
                    (Path(scratch) / name).replace(directory / name)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
        data = directory / f"{path.name}.data"
        return Artifact(path, path.stat().st_size + data.stat().st_size)


def _write_bytes(path: Path, model: onnx.ModelProto) -> None:
    path.write_bytes(model.SerializeToString())
