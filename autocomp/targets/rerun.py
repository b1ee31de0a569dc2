"""Run in a process of its own: load an exported model as its card says, save its logits.

    python -P rerun.py MODEL INPUTS.npz LOGITS.npy THREADS

The runtime and numpy are all that is imported, and torch, transformers, onnx and autocomp cannot
be: what loads here loads at a user's. Inputs are those of the model, ids renumbered; a cache is
empty.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

REFUSED = ("torch", "transformers", "onnx", "autocomp")


class _Refuse:
    """Keeps modules from being imported that a user of the exported model may not have."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in REFUSED:
            raise ImportError(f"{name} is not for users of the exported model")


def main(model: str, inputs: str, output: str, threads: str) -> None:
    """Write the logits of `model` on `inputs`."""
    sys.meta_path.insert(0, _Refuse())
    with np.load(inputs, allow_pickle=False) as arrays:
        feeds = {name: arrays[name] for name in arrays.files}
    run = _openvino if Path(model).suffix == ".xml" else _onnxruntime
    logits = run(model, feeds, int(threads))
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & set(REFUSED))
    if loaded:
        raise SystemExit(f"{', '.join(loaded)} was imported")
    np.save(output, logits)


def _onnxruntime(model: str, feeds: dict[str, Any], threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    types = {"tensor(int64)": "int64", "tensor(int8)": "int8"}
    taken = {
        one.name: _input(one.name, one.shape, types.get(one.type, "float32"), feeds)
        for one in session.get_inputs()
    }
    return session.run(["logits"], taken)[0]


def _openvino(model: str, feeds: dict[str, Any], threads: int) -> Any:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it reports every import
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    taken = {}
    for one in compiled.inputs:
        sides = [side.get_length() if side.is_static else None for side in one.get_partial_shape()]
        taken[one.any_name] = _input(one.any_name, sides, one.element_type.to_dtype(), feeds)
    return compiled(taken)["logits"]


def _input(name: str, sides: list[Any], kind: Any, feeds: dict[str, Any]) -> Any:
    """What is given, or a cache of nothing for as many examples."""
    if name in feeds:
        return feeds[name]
    examples = len(next(iter(feeds.values())))
    empty = [
        side if isinstance(side, int) else 0 if axis else examples
        for axis, side in enumerate(sides)
    ]
    return np.zeros(empty, kind)


if __name__ == "__main__":
    main(*sys.argv[1:])
