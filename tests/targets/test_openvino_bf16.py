"""OpenVINO in bfloat16: what is rounded, what is not, and who compiles the file gets it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from target_examples import TextTask, quantise_unit, small_model

from autocomp.spec.schema import TargetSection, WorkloadSection
from autocomp.targets import make_target
from autocomp.targets.runtimes import PARTICULAR, with_relatives

openvino = pytest.importorskip("openvino", reason="the runtime is an extra")
NATIVE = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
native = pytest.mark.skipif(not NATIVE, reason="the processor has no bfloat16")


def target(runtime: str = "openvino_bf16") -> Any:
    return make_target(TargetSection(runtime=runtime, workload=WorkloadSection(sequence=12)))


def layers(compiled: Any, kind: str) -> list[str]:
    """The kernels that layers of this kind run in."""
    infos = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ops()]
    return [str(i["primitiveType"].value) for i in infos if i["layerType"].value == kind]


@native
@pytest.mark.parametrize("layout", ["bert", "llama", "vit"])
def test_it_agrees_with_torch_as_bfloat16_does(exported, layout, tmp_path):
    """These random models amplify rounding: torch computing in bfloat16 itself is the measure."""
    model, units, task, skeleton = exported(layout)
    runtime = target()
    artifact = runtime.write(runtime.lower(skeleton, model, units), tmp_path)
    tensors = task.example_inputs(1, 12)
    with torch.no_grad():
        expected = model(**tensors).logits
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(**tensors).logits.float()
    allowed = 4 * float((rounded - expected).abs().max())  # norms and sums are rounded here too
    found = runtime.verify(artifact, model, {k: v.numpy() for k, v in tensors.items()})
    assert 1e-3 * allowed < found < allowed
    single = target("openvino")
    assert single.verify(artifact, model, {k: v.numpy() for k, v in tensors.items()}) < 1e-2 * found


@native
def test_a_plain_compile_elsewhere_computes_the_same(exported, tmp_path):
    """Without settings, as `Core().compile_model(path)` does on a processor that has bfloat16."""
    model, units, task, skeleton = exported("bert")
    runtime = target()
    artifact = runtime.write(runtime.lower(skeleton, model, units), tmp_path)
    inputs = {name: value.numpy() for name, value in task.example_inputs(1, 12).items()}
    compiled = openvino.Core().compile_model(artifact.path, "CPU")
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.bf16
    kernels = layers(compiled, "FullyConnected")
    assert kernels
    assert all(kernel.endswith("bf16") for kernel in kernels)
    found = compiled(inputs)["logits"]
    np.testing.assert_allclose(found, runtime.run(artifact, inputs), rtol=1e-2, atol=1e-2)


@native
def test_integer_sites_stay_integer(tmp_path):
    """Dynamic int8 multiplies integers taken from rounded inputs; the rest is bfloat16."""
    model, units, _ = small_model("bert", hidden_size=64, intermediate_size=128)
    task = TextTask()
    runtime = target()
    skeleton = runtime.export(model, units, task)
    for unit in units:
        if unit.kind in ("attention", "ffn"):
            quantise_unit(model, unit, 8, None, 8)
    artifact = runtime.write(runtime.lower(skeleton, model, units), tmp_path)
    compiled = openvino.Core().compile_model(
        artifact.path, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"}
    )
    infos = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ops()]
    kinds = [i["runtimePrecision"].value for i in infos if i["layerType"].value == "FullyConnected"]
    assert kinds.count("i8") == 2 * 6


@native
def test_it_is_a_runtime_of_its_own(exported, tmp_path):
    other = target("openvino")
    assert target().fingerprint() != other.fingerprint()
    assert target().describe()["precision"] == "bf16"
    assert "precision" not in other.describe()  # nor did it before
    model, units, task, skeleton = exported("bert")
    artifact = target().write(target().lower(skeleton, model, units), tmp_path / "one")
    again = other.write(other.lower(skeleton, model, units), tmp_path / "two")
    assert artifact.size_bytes == again.size_bytes
    inputs = {name: value.numpy() for name, value in task.example_inputs(1, 12).items()}
    assert 20e6 < target().peak_memory(artifact, inputs) < 400e6


def test_where_the_processor_lacks_it_the_target_is_left_out():
    code = (
        "import openvino;"
        "openvino.Core.get_property = lambda *_: ['FP32', 'INT8'];"
        "from autocomp.targets.runtimes import unusable, usable_runtimes;"
        "from autocomp.spec.schema import TargetSection;"
        "print(unusable('openvino_bf16-cpu'));"
        "print(usable_runtimes(TargetSection(runtime='auto')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reason, found = done.stdout.strip().splitlines()
    assert "needs a processor with instructions for bfloat16" in reason
    assert found.startswith("(('onnxruntime', 'openvino'), ['runtime openvino_bf16 is left out: ")


@native
def test_auto_searches_on_it_too():
    from autocomp.targets.runtimes import usable_runtimes

    runtimes, _ = usable_runtimes(TargetSection(runtime="auto"))
    assert runtimes[:3] == ("onnxruntime", "openvino", "openvino_bf16")


def test_operators_name_it_through_its_relative():
    assert with_relatives(("onnxruntime-cpu", "openvino-cpu")) == [
        "onnxruntime-cpu",
        "openvino-cpu",
        *PARTICULAR,
    ]
