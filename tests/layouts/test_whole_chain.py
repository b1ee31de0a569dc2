"""Every layout through the whole chain: teacher on disk → units → statistics → library → stitched
model → exported graph → artifact, whose logits are torch's.

A target joins by its name in `TARGET_NAMES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from model_examples import EXAMPLES, logits
from target_examples import ImageTask, TextTask
from torch import nn

from autocomp.calibrate.stream import calibrate, fingerprint
from autocomp.core.candidate import Candidate, Option
from autocomp.core.unit import Unit
from autocomp.export.artifact import reloaded_logits
from autocomp.library.build import build, plan_build
from autocomp.library.stitch import stitch
from autocomp.library.store import Library
from autocomp.models.conversion import save_model
from autocomp.models.discover import find_units
from autocomp.models.layouts import LAYOUTS
from autocomp.models.load import load_model
from autocomp.models.sources import read_config, read_tensor_shapes
from autocomp.operators import unit_options
from autocomp.operators.protocol import Rule
from autocomp.operators.replace import distil
from autocomp.spec.schema import TargetSection, WorkloadSection
from autocomp.targets import make_target
from autocomp.targets.protocol import Target

TARGET_NAMES = ("onnxruntime-cpu", "openvino-cpu")
SHAPES = ((1, 9), (3, 5))
ATTENTION, FFN = "layers.*.attention", "layers.*.ffn"


def bits(
    method: str, weights: int, activations: int | str = "dense", group: int = 0
) -> dict[str, Any]:
    return {
        "method": method,
        "weights": [weights],
        "activations": [activations],
        "group": group,
        "range": "minmax",
    }


INT8 = bits("gptq", 8, 8)
INT4 = bits("gptq", 4, group=16)
CANDIDATES: dict[str, dict[str, Rule]] = {
    "narrow": {ATTENTION: Rule({"heads": [0.5]}), FFN: Rule({"width": [0.5]})},
    "replaced": {ATTENTION: Rule({"replace": ["hedgehog"]}, bits("gptq", 8))},
    "shallow": {"layers.0.attention": Rule({"skip": True}), "layers.1.ffn": Rule({"skip": True})},
    "int8 weights": {"layers.*": Rule({}, bits("gptq", 8)), "embeddings": Rule({}, bits("rtn", 8))},
    "int4 weights": {"layers.*": Rule({}, INT4), "embeddings": Rule({}, bits("rtn", 4, group=16))},
    "int8": {"layers.*": Rule({}, INT8), "head": Rule({}, INT8)},
    "rich": {
        ATTENTION: Rule({"rank": [0.6]}, bits("gptq", 8, "static")),
        FFN: Rule({}, bits("awq", 4, group=16)),
        "embeddings": Rule({"rank": [0.6]}),
    },
    "mixed": {
        "layers.0.attention": Rule({"heads": [0.5]}, INT8),
        "layers.0.ffn": Rule({"width": [0.5]}, INT4),
        "layers.1.attention": Rule({"skip": True}),
        "layers.1.ffn": Rule({}, INT8),
        "embeddings": Rule({}, bits("rtn", 8)),
    },
}
TOLERANCE = {"int8": 5e-2, "mixed": 5e-2, "rich": 0.1, "int4 weights": 2e-3}
"""Of the logits' spread; else 1e-4. An 8-bit activation may fall on the other side of a step, and
the factors of a low-rank site are two such steps in a row."""
OWN_GRAIN = {"onnxruntime-cpu": 1.0, "openvino-cpu": 4.0}
"""Times that: OpenVINO quantises activations by groups of a token's columns, torch by tensor; the
norms of single heads in Qwen3 amplify what that changes."""


@dataclass(frozen=True)
class Chain:
    """What a study has before its first trial."""

    teacher: nn.Module
    units: list[Unit]
    task: TextTask | ImageTask
    candidates: dict[str, Candidate]
    library: Library
    keys: dict[tuple[str, str], str]

    @cached_property
    def skeleton(self) -> onnx.ModelProto:
        """Every target lowers from the same."""
        return target_named(TARGET_NAMES[0]).export(self.teacher, self.units, self.task)

    def stitched(self, name: str) -> nn.Module:
        return stitch(self.teacher, self.units, self.library, self.keys, self.candidates[name])


def options_of(unit: Unit) -> dict[str, Option]:
    """Candidate → the option its last rule for this unit names."""
    found: dict[str, Option] = {}
    for name, rules in CANDIDATES.items():
        for pattern, rule in rules.items():
            if fnmatchcase(unit.name, pattern) and unit.tied_to is None:
                found[name] = unit_options(unit, rule)[-1]
    return found


def make_chain(layout: str, root: Path) -> Chain:
    example = EXAMPLES[layout]
    save_model(example.model(**{LAYOUTS[layout].keys.layers: 2}), root / "teacher")
    config, shapes = read_config(root / "teacher"), read_tensor_shapes(root / "teacher")
    units = find_units(config, shapes, example.task, example.labels)
    teacher = load_model(root / "teacher", example.task, example.labels)
    batch = example.inputs(batch=6)
    stats: dict[str, Path] = {}
    replaced = [unit.name for unit in units if unit.kind == "attention"]
    for _, files in calibrate(teacher, units, [batch], root / "stats", record=replaced):
        stats |= files
    options = {unit.name: options_of(unit) for unit in units}
    library = Library(root / "library")
    plan = plan_build(
        root / "teacher",
        units,
        {name: list(dict.fromkeys(found.values())) for name, found in options.items()},
        stats,
        fingerprint([batch]),
        library,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distil, "SETTINGS", distil.Settings(steps=4, trial_steps=1, check_every=2))
        assert len(build(plan)) == plan.missing > 0
    candidates = {
        name: Candidate.of({unit: found[name] for unit, found in options.items() if name in found})
        for name in CANDIDATES
    }
    task: TextTask | ImageTask = ImageTask()
    if example.task != "image-classification":
        task = TextTask(masked=example.task == "text-classification")
    return Chain(teacher, units, task, candidates, library, plan.keys)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Chain]:
    kept: dict[str, Chain] = {}

    def get(layout: str) -> Chain:
        if layout not in kept:
            kept[layout] = make_chain(layout, tmp_path_factory.mktemp(layout))
        return kept[layout]

    return get


def target_named(name: str) -> Target:
    runtime, device = name.split("-")
    workload = WorkloadSection(batch=1, sequence=SHAPES[0][1], threads=1)
    return make_target(TargetSection(device=device, runtime=runtime, workload=workload))


@pytest.mark.parametrize("target_name", TARGET_NAMES)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_artifacts_compute_what_torch_does(
    layout: str, target_name: str, chain: Callable[[str], Chain], tmp_path: Path
) -> None:
    made, target = chain(layout), target_named(target_name)
    skeleton = made.skeleton
    dense = logits(made.teacher, made.task.example_inputs(*SHAPES[0]))
    spread, sizes = float(dense.std()), {}
    for name in ("dense", *CANDIDATES):
        model = made.teacher if name == "dense" else made.stitched(name)
        artifact = target.write(target.lower(skeleton, model, made.units), tmp_path / name)
        sizes[name] = artifact.size_bytes
        for shape in SHAPES:
            inputs = made.task.example_inputs(*shape)
            feeds = {k: v.numpy() for k, v in inputs.items()}
            difference = target.verify(artifact, model, feeds)
            allowed = TOLERANCE[name] * OWN_GRAIN[target_name] if name in TOLERANCE else 1e-4
            assert difference < allowed * spread, (name, shape, difference)
        changed = (logits(model, made.task.example_inputs(*SHAPES[0])) - dense).abs().max()
        assert (name == "dense") == (float(changed) == 0.0), name
        if name == "rich":  # as an export is verified, in a process that has the runtime alone
            reloaded = reloaded_logits(artifact, feeds, threads=1)
            np.testing.assert_allclose(reloaded, target.run(artifact, feeds), rtol=0, atol=1e-5)
    assert all(sizes[name] < sizes["dense"] for name in ("narrow", "shallow"))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_kind_of_unit_is_compressed(layout: str, chain: Callable[[str], Chain]) -> None:
    made = chain(layout)
    touched = {unit for one in made.candidates.values() for unit in one.by_unit}
    assert touched == {unit.name for unit in made.units if unit.tied_to is None}
    assert torch.isfinite(logits(made.stitched("mixed"), EXAMPLES[layout].inputs())).all()
