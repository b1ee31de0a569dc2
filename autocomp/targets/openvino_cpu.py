"""OpenVINO on the CPU. The only file that imports openvino, besides `rerun`; torch, onnx on demand.

Everything is computed in float32 unless its format says otherwise: the plugin's own default is
bfloat16 where the processor has it, and it reads a model's precision from the settings it is
compiled with, not from the file. `openvino_bf16` is that other precision. How many columns the
plugin quantises together does stand in the file, so that whoever compiles it gets the same.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.core.errors import InternalError, StorageError, UserError
from autocomp.targets.clock import Run
from autocomp.targets.load_memory import OPENVINO
from autocomp.targets.protocol import Artifact
from autocomp.targets.runtime import Array, CpuTarget, Session

if TYPE_CHECKING:
    import onnx

    from autocomp.targets.lower import Recipes

_telemetry = sys.modules.get("openvino_telemetry")
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it reports every import
try:
    import openvino
except ImportError as error:
    raise UserError(
        f"runtime openvino needs the package openvino, which cannot be imported ({error}). "
        "Install it: pip install 'autocomp[openvino]'"
    ) from error
finally:
    del sys.modules["openvino_telemetry"]
    if _telemetry is not None:
        sys.modules["openvino_telemetry"] = _telemetry

_PROTOBUF_LIMIT = 2_000_000_000


@dataclass(frozen=True)
class _Input:
    """An input as a session tells of it; dimensions that vary are `None`."""

    name: str
    shape: tuple[int | None, ...]
    type: str


class OpenVinoSession:
    """A compiled model, in the terms of ONNX Runtime's sessions."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._outputs = {name: port for port in compiled.outputs for name in port.names}

    def get_inputs(self) -> list[_Input]:
        """See `Session.get_inputs`."""
        return [
            _Input(
                port.any_name,
                tuple(
                    None if dim.is_dynamic else dim.get_length() for dim in port.get_partial_shape()
                ),
                f"tensor({port.get_element_type().to_dtype()})",
            )
            for port in self._compiled.inputs
        ]

    def run(self, names: Sequence[str] | None, feed: Mapping[str, Array]) -> list[Array]:
        """See `Session.run`."""
        missing = [one.name for one in self.get_inputs() if one.name not in feed]
        if missing:  # the plugin would read whatever lies there
            raise InternalError(f"the model reads {', '.join(missing)}, which was not given")
        values = self._request.infer(dict(feed))
        return [np.array(values[self._outputs[name]]) for name in names or self._outputs]

    def bind(self, feed: Mapping[str, Array]) -> Run:
        """See `CpuTarget.bound`: a request of its own, whose inputs are set once."""
        request = self._compiled.create_infer_request()
        for name, array in feed.items():
            request.set_tensor(name, openvino.Tensor(np.ascontiguousarray(array)))
        return partial(request.infer, share_outputs=True)


def capabilities() -> Sequence[str]:
    """What this processor has instructions for, as the plugin sees it: `BF16`, `INT8`, …"""
    found: Sequence[str] = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return found


def open_session(
    model: Path | openvino.Model, threads: int, precision: str = "f32"
) -> OpenVinoSession:
    """A session as the card of an exported model opens it, on `threads` threads.

    `precision`, of all that is float in the model: `f32` or `bf16`.
    """
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    core = openvino.Core()
    read = core.read_model(model) if isinstance(model, Path) else model
    return OpenVinoSession(core.compile_model(read, "CPU", settings))


class OpenVinoTarget(CpuTarget):
    """A model as OpenVINO IR in OpenVINO on this machine's CPU."""

    name = "openvino-cpu"
    summary = "OpenVINO on the CPU: float32, int8 (fixed ranges are fastest), 4-bit weights"
    lowering_version = 1
    loading = OPENVINO
    warm_runs = 1  # the sum of the pieces is 4% below a whole model; 35% above it without

    @property
    def recipes(self) -> Recipes:
        """See `openvino_recipes`."""
        from autocomp.targets import openvino_recipes

        return openvino_recipes

    def runtime(self) -> str:
        """Name and version."""
        return f"openvino {openvino.get_version().partition('-')[0]}"

    def open(self, model: Path | onnx.ModelProto) -> OpenVinoSession:
        """See `open_session`."""
        source = model if isinstance(model, Path) else self._read(model)
        return open_session(source, self.workload.threads)

    def bound(self, session: Session, feed: Mapping[str, Array]) -> Run:
        """See `OpenVinoSession.bind`."""
        assert isinstance(session, OpenVinoSession)
        return session.bind(feed)

    def anchor(self) -> tuple[onnx.ModelProto, Mapping[str, Array]]:
        """The anchor in this runtime's operators."""
        from autocomp.targets.anchor import anchor_inputs
        from autocomp.targets.openvino_anchor import anchor_model

        return anchor_model(), anchor_inputs()

    def lowered_bytes(self, lowered: onnx.ModelProto) -> int:
        """Bytes of the IR's XML and of all weights, equal ones (which are stored once) included."""
        with tempfile.TemporaryDirectory() as scratch:
            layers = self.write(lowered, Path(scratch)).path.stat().st_size
        return layers + sum(len(tensor.raw_data) for tensor in lowered.graph.initializer)

    def write(self, lowered: onnx.ModelProto, directory: Path) -> Artifact:
        """`model.xml` and `model.bin` in `directory`; weights are stored as they are.

        Raises:
            StorageError: if the disk refuses; nothing partial is left under the final names.
        """
        from autocomp.targets.openvino_ir import compact

        directory.mkdir(parents=True, exist_ok=True)
        path, weights = directory / "model.xml", directory / "model.bin"
        model = self._read(lowered)
        names = {name for port in (*model.inputs, *model.outputs) for name in port.names}
        try:
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                temporary = Path(scratch) / path.name
                openvino.save_model(model, temporary, compress_to_fp16=False)
                compact(temporary, names)
                temporary.with_suffix(".bin").replace(weights)
                temporary.replace(path)
        except (OSError, RuntimeError) as error:
            free = shutil.disk_usage(directory).free
            raise StorageError(f"cannot write {path} ({free} bytes free): {error}") from error
        return Artifact(path, path.stat().st_size + weights.stat().st_size)

    def _read(self, lowered: onnx.ModelProto) -> openvino.Model:
        """A lowered graph as OpenVINO's model."""
        from autocomp.targets.openvino_recipes import group_columns

        model = _from_onnx(lowered)
        model.set_rt_info(
            str(group_columns(self.tokens)), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]
        )
        return model


def _from_onnx(lowered: onnx.ModelProto) -> openvino.Model:
    core = openvino.Core()
    if sum(len(tensor.raw_data) for tensor in lowered.graph.initializer) < _PROTOBUF_LIMIT:
        return core.read_model(lowered.SerializeToString())
    import onnx

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        onnx.save(lowered, path, save_as_external_data=True, location="model.data")
        model = core.read_model(path)
        model.validate_nodes_and_infer_types()
        return model.clone()
