"""The OpenVINO target as a whole: lowered models against torch, files, measurements, profile."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reduced import keep_heads, keep_width
from target_examples import ImageTask, TextTask, quantise_unit, small_model

from autocomp.core.errors import UserError
from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import dense_format
from autocomp.models.surgery import skip
from autocomp.models.tokens import install_tokens
from autocomp.spec.schema import TargetSection, WorkloadSection
from autocomp.targets import TARGETS, make_target
from autocomp.targets.generation import generate
from autocomp.targets.profile import check_table, lower_formats, profile, random_choice

pytest.importorskip("openvino", reason="the runtime is an extra")

LAYOUTS = ("bert", "vit", "llama")
OTHERS = ("qwen3", "gpt2", "deit", "dinov2")


def target(sequence: int = 12, **more):
    section = TargetSection(runtime="openvino", workload=WorkloadSection(sequence=sequence))
    return make_target(section, **more)


def arrays(task, batch: int = 1, sequence: int = 12) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in task.example_inputs(batch, sequence).items()}


def differences(skeleton, model, task, directory, shapes=((1, 12), (4, 9))) -> float:
    """Largest difference from torch, relative to the spread of the logits."""
    runtime = target()
    artifact = runtime.write(runtime.lower(skeleton, model, []), directory)
    spread = float(model(**task.example_inputs(1, 12)).logits.detach().std())
    return max(runtime.verify(artifact, model, arrays(task, *shape)) for shape in shapes) / spread


@pytest.mark.parametrize("layout", [*LAYOUTS, *OTHERS])
def test_dense_equals_torch_at_every_shape(exported, layout, tmp_path):
    model, _, task, skeleton = exported(layout)
    shapes = ((1, 12), (4, 12), (1, 1), (3, 31))
    assert differences(skeleton, model, task, tmp_path, shapes) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pruned_and_skipped_equals_torch(exported, layout, tmp_path):
    dense, units, task, skeleton = exported(layout)
    model = copy.deepcopy(dense)
    by_name = {unit.name: unit for unit in units}
    attention = by_name["layers.0.attention"]
    per_group = attention.heads // attention.kv_heads
    keep_heads(model, attention, list(range(per_group, 2 * per_group)))
    keep_width(model, by_name["layers.1.ffn"], list(range(0, 64, 2)))
    skip(model, by_name["layers.0.ffn"])
    assert differences(skeleton, model, task, tmp_path) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("bits", "group", "activations", "tolerance"),
    [(8, None, 32, 1e-4), (4, 16, 32, 5e-3), (8, None, 8, 0.25), (4, 16, 8, 0.25)],
)
def test_quantised_equals_torch(exported, layout, bits, group, activations, tolerance, tmp_path):
    """Up to the rounding of activations, which is finer here than in torch."""
    dense, units, task, skeleton = exported(layout)
    model = copy.deepcopy(dense)
    for unit in units:
        quantise_unit(model, unit, bits, group, activations)
    assert differences(skeleton, model, task, tmp_path) < tolerance


def test_fewer_tokens_equal_torch(tmp_path):
    dense, units, _ = small_model("vit", image_size=48, num_hidden_layers=3)
    task = ImageTask(48)
    model = copy.deepcopy(dense)
    merged, fused = TokenReduction("tome", 0.25), TokenReduction("token_fuse", 0.25)
    install_tokens(model, units, {"layers.0.attention": merged, "layers.1.attention": fused})
    skeleton = target().export(dense, units, task)
    assert differences(skeleton, model, task, tmp_path) < 1e-4


@pytest.mark.parametrize(("bits", "tolerance"), [(32, 1e-4), (4, 0.3)])
def test_generation_equals_torch(bits, tolerance, tmp_path):
    """The graph with a cache: whole prompts, and token by token after them."""
    model, units, _ = small_model("llama", tie_word_embeddings=False)
    model.config.use_cache = False
    task = TextTask(masked=False)
    runtime = make_target(
        TargetSection(runtime="openvino", workload=WorkloadSection(prompt=9, generate=12))
    )
    skeleton = runtime.export(model, units, task)
    if bits < 32:
        for unit in units:
            quantise_unit(model, unit, bits, 32, 8)
    artifact = runtime.write(runtime.lower(skeleton, model, units), tmp_path)
    prompts = task.example_inputs(2, 9)
    inputs = {"input_ids": prompts["input_ids"].numpy()}
    with torch.no_grad():
        spread = float(model(**prompts).logits.std())
        assert runtime.verify(artifact, model, inputs) < tolerance * spread
        session = runtime.open(artifact.path)
        found = generate(session, inputs, 6)
        ids = prompts["input_ids"]
        for _ in range(6 if bits == 32 else 0):
            best = model(input_ids=ids).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, best[:, None]], dim=1)
    assert found.shape == (2, 6)
    if bits == 32:
        np.testing.assert_array_equal(found, ids[:, 9:].numpy())


@pytest.fixture
def small(exported, tmp_path):
    """(artifact, inputs, model, lowered) of the small BERT."""
    model, units, task, skeleton = exported("bert")
    lowered = target().lower(skeleton, model, units)
    return target().write(lowered, tmp_path), arrays(task), model, lowered


def test_the_file_says_how_activations_are_grouped(small):
    import openvino

    artifact, inputs, *_ = small
    compiled = openvino.Core().compile_model(artifact.path, "CPU")
    assert int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) == 128
    assert "\n\t" not in artifact.path.read_text()  # nothing is spent on white space
    assert [one.name for one in target().open(artifact.path).get_inputs()] == list(inputs)


def test_runtimes_and_workloads_have_fingerprints_of_their_own():
    other = make_target(TargetSection(workload=WorkloadSection(sequence=12)))
    prints = {target().fingerprint(), target(13).fingerprint(), other.fingerprint()}
    assert len(prints) == 3
    assert target().describe()["runtime"].startswith("openvino 20")


def test_profiling_a_small_model(exported):
    _, units, task, skeleton = exported("llama")
    formats = {unit.name: {"dense": dense_format(unit)} for unit in units}
    for unit in units:
        if unit.skippable:
            formats[unit.name]["skip"] = {}
    runtime = target()
    table = profile(runtime, skeleton, units, formats, arrays(task), candidates=2)
    assert len(table.pairs) == 3
    assert table.device == runtime.fingerprint()
    rng = random.Random(0)
    for _ in range(3):
        choice = random_choice(rng, formats)
        chosen = {unit: formats[unit][key] for unit, key in choice.items()}
        size = runtime.lowered_bytes(lower_formats(runtime, skeleton, units, chosen))
        tied = [u for u in table.ties if choice[u] == "dense"]
        shared = sum(table.entry(unit, "dense").size_bytes for unit in tied)
        skipped = sum(not formats for formats in chosen.values())
        over = table.predict(choice).size_bytes + shared - size
        # What lies between the sites of a skipped unit goes with it, and is not foreseen.
        assert -0.02 * size < over < 0.02 * size + 60_000 * skipped
    accuracy = check_table(table, runtime, skeleton, units, formats, arrays(task), candidates=2)
    assert accuracy.mean_error < 1.0
    assert table.entries["layers.0.ffn"] == table.entries["layers.1.ffn"]


def test_importing_it_reports_nothing_to_anyone():
    code = (
        "import sys, autocomp.targets.openvino_cpu;"
        "print([m for m in sys.modules if m.startswith(('openvino_telemetry', 'onnxruntime'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path):
    code = (
        "import sys; sys.modules['openvino'] = None;"
        "from autocomp.targets import TARGETS; from autocomp.core.errors import UserError;"
        "from autocomp.api.listing import list_kind\n"
        "try: TARGETS.get('openvino-cpu')\n"
        "except UserError as error: print(error)\n"
        "print([(r['name'], 'pip install' in r['summary']) for r in list_kind('targets')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, rows = done.stdout.strip().splitlines()
    assert "pip install 'autocomp[openvino]'" in first
    assert rows == (
        "[('onnxruntime-cpu', False), ('openvino-cpu', True), ('openvino_bf16-cpu', True)]"
    )


def test_the_registry_knows_it_and_other_devices_are_refused():
    assert TARGETS.get("openvino-cpu").name == "openvino-cpu"
    with pytest.raises(UserError, match="unknown target"):
        make_target(TargetSection(runtime="openvino", device="gpu"))
