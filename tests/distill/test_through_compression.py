"""Training through compression: what is exported afterwards is what was trained.

For each kind of compression a student is stitched from a library, distilled for a few steps, and
exported; the artifact's logits are compared with those of the model as it was trained: on floats
that stand for codes, with gradients going straight through. Masks, grids and shapes are those it
was given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from model_examples import EXAMPLES
from onnx import TensorProto, numpy_helper
from replaced_examples import calm
from target_examples import TextTask
from text_examples import Texts
from torch import nn
from word_examples import CountingGate

from autocomp.calibrate.stats import SiteStats, save_stats
from autocomp.calibrate.stream import calibrate, fingerprint
from autocomp.core.candidate import Candidate, Distillation, Option
from autocomp.core.unit import Unit
from autocomp.distill.trainer import distil
from autocomp.library.build import build, plan_build
from autocomp.library.stitch import stitch
from autocomp.library.store import Library
from autocomp.library.student import unit_state
from autocomp.models.codes import CODE_RANGE, dequantise, fake_quantise_weight
from autocomp.models.conversion import save_model
from autocomp.models.discover import find_units
from autocomp.models.load import load_model
from autocomp.models.modules import QuantEmbedding, QuantLinear
from autocomp.models.pruned_table import model_vocabulary
from autocomp.models.sources import read_config, read_tensor_shapes
from autocomp.models.sparse import SparseLinear
from autocomp.operators import option_formats, unit_options
from autocomp.operators.protocol import Rule
from autocomp.operators.replace import distil as local
from autocomp.spec.schema import TargetSection, WorkloadSection
from autocomp.targets import make_target
from autocomp.tasks.protocol import Task

INT8 = TensorProto.INT8
SETTINGS = Distillation(tokens=1500, lr=5e-3, temperature=1.0)
"""Some ten steps."""

KEPT = range(0, 50, 2)
"""Tokens of the pruned vocabulary; all others are read as the second of them."""

LAYERS, ATTENTION, FFN = "layers.*", "layers.*.attention", "layers.*.ffn"


def bits(method: str, weights: int, activations: int | str = "dense", group: int = 0) -> Any:
    asked = {"weights": [weights], "activations": [activations], "group": group}
    return {"method": method, "range": "minmax", **asked}


def zeros(level: float | str) -> dict[str, Any]:
    return {"method": "sparsegpt", "levels": [level]}


KINDS: dict[str, dict[str, Rule]] = {
    "int8 weights": {LAYERS: Rule({}, bits("gptq", 8)), "embeddings": Rule({}, bits("rtn", 8))},
    "int4 weights": {
        LAYERS: Rule({}, bits("gptq", 4, group=16)),
        "embeddings": Rule({}, bits("rtn", 4, group=16)),
    },
    "dynamic int8": {LAYERS: Rule({}, bits("gptq", 8, 8))},
    "static int8": {LAYERS: Rule({}, bits("gptq", 8, "static"))},
    "half zeros": {LAYERS: Rule(sparsity=zeros(0.5))},
    "2:4 zeros": {LAYERS: Rule(sparsity=zeros("2:4"))},
    "half of int8": {LAYERS: Rule({}, bits("gptq", 8), sparsity=zeros(0.5))},
    "heads and width": {ATTENTION: Rule({"heads": [0.5]}), FFN: Rule({"width": [0.5]})},
    "low rank": {LAYERS: Rule({"rank": [0.5]}), "embeddings": Rule({"rank": [0.5]})},
    "low rank int8": {LAYERS: Rule({"rank": [0.5]}, bits("gptq", 8))},
    "hedgehog": {ATTENTION: Rule({"replace": ["hedgehog"]})},
    "retention": {ATTENTION: Rule({"replace": ["retention"]}, bits("gptq", 8))},
    "vocabulary": {"embeddings": Rule({"vocabulary": {"keep": len(KEPT), "unknown": 2}})},
    "skipped": {"layers.1.attention": Rule({"skip": True}), "layers.0.ffn": Rule({"skip": True})},
}
TOLERANCE = {
    "int4 weights": {"onnxruntime": 1e-2, "openvino": 1e-2},  # 2.5e-3, 3.7e-3
    "dynamic int8": {"onnxruntime": 0.2, "openvino": 0.4},  # 6.2e-2, 0.19
    "static int8": {"openvino": 0.2},  # 7.4e-2
    "retention": {"onnxruntime": 2e-4, "openvino": 2e-4},  # 2.7e-5, 2.0e-5
}
"""Largest difference of a logit, as a share of their spread, beside the largest seen;
elsewhere 2e-5 (3.5e-6).

4-bit weights are rounded once more where they are widened to 8 bits. A value between two steps of
8-bit activations may fall to either side; OpenVINO finds their range by groups of columns.
"""
MIXERS = ("hedgehog", "retention")
"""Mixers take longest to train and to export."""
NOT_OFFERED = {"half zeros", "2:4 zeros", "half of int8"}
"""What OpenVINO is not asked for: sparse weights gain nothing there."""


@dataclass(frozen=True)
class Bench:
    """A teacher with the library of every kind of compression."""

    teacher: nn.Module
    units: list[Unit]
    task: Texts
    candidates: dict[str, Candidate]
    library: Library
    keys: dict[tuple[str, str], str]
    skeleton: onnx.ModelProto
    kept: dict[str, nn.Module] = field(default_factory=dict)

    def student(self, kind: str) -> nn.Module:
        return stitch(self.teacher, self.units, self.library, self.keys, self.candidates[kind])

    def trained(self, kind: str) -> nn.Module:
        if kind not in self.kept:
            self.kept[kind] = self.student(kind)
            args = self.kept[kind], self.teacher, cast(Task, self.task), SETTINGS
            distil(*args, batch=24, seed=0, gate=CountingGate())
        return self.kept[kind]


def option_of(unit: Unit, rules: dict[str, Rule]) -> Option | None:
    rule = next((rule for pattern, rule in rules.items() if fnmatchcase(unit.name, pattern)), None)
    return None if rule is None or unit.tied_to is not None else unit_options(unit, rule)[-1]


def make_bench(layout: str, kinds: Sequence[str], root: Path) -> Bench:
    example = EXAMPLES[layout]
    save_model(calm(example.model()), root / "teacher")
    config, shapes = read_config(root / "teacher"), read_tensor_shapes(root / "teacher")
    units = find_units(config, shapes, example.task, example.labels)
    teacher = load_model(root / "teacher", example.task, example.labels)
    task, stats = Texts(layout), {}
    attention = [unit.name for unit in units if unit.kind == "attention"]
    for _, files in calibrate(teacher, units, task.all, root / "stats", record=attention):
        stats |= files
    counts = torch.zeros(50, dtype=torch.int64)
    counts[list(KEPT)] = 1
    rows = SiteStats(torch.empty(0, 0), torch.empty(0), int(counts.sum()), counts)
    stats["embeddings"] = root / "rows.safetensors"
    save_stats(stats["embeddings"], {units[0].site("embedding").name: rows})  # type: ignore[union-attr]
    chosen = {
        kind: {unit.name: found for unit in units if (found := option_of(unit, rules)) is not None}
        for kind, rules in ((kind, KINDS[kind]) for kind in kinds)
    }
    options = {
        unit.name: list(
            dict.fromkeys(one[unit.name] for one in chosen.values() if unit.name in one)
        )
        for unit in units
    }
    library = Library(root / "library")
    plan = plan_build(root / "teacher", units, options, stats, fingerprint(task.all), library)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "SETTINGS", local.Settings(steps=4, trial_steps=1, check_every=2))
        build(plan)
    candidates = {kind: Candidate.of(its) for kind, its in chosen.items()}
    text = TextTask(masked=example.task == "text-classification")
    skeleton = target_on("onnxruntime").export(teacher, units, text)
    return Bench(teacher, units, task, candidates, library, plan.keys, skeleton)


def target_on(runtime: str) -> Any:
    workload = WorkloadSection(batch=24, sequence=12, threads=1)
    return make_target(TargetSection(runtime=runtime, workload=workload))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Bench]:
    """Layout and kind → the bench; mixers, which take longest to train, have one of their own."""
    kept: dict[tuple[str, bool], Bench] = {}

    def get(layout: str, kind: str) -> Bench:
        mixers = kind in MIXERS
        if (layout, mixers) not in kept:
            kinds = MIXERS if mixers else [kind for kind in KINDS if kind not in MIXERS]
            kept[layout, mixers] = make_bench(layout, kinds, tmp_path_factory.mktemp(layout))
        return kept[layout, mixers]

    return get


def marks_of(kind: str) -> list[Any]:
    return [pytest.mark.slow] if kind in MIXERS else []


def every_kind() -> list[Any]:
    return [pytest.param(kind, marks=marks_of(kind)) for kind in KINDS]


def runs() -> list[Any]:
    """(layout, kind, runtime)."""
    found = []
    for layout, runtime in product(("bert", "llama"), ("onnxruntime", "openvino")):
        for kind in KINDS:
            if runtime == "openvino" and kind in NOT_OFFERED:
                continue
            if layout == "llama" and kind == "vocabulary":
                continue  # a language model must be able to answer any token
            found.append(pytest.param(layout, kind, runtime, marks=marks_of(kind)))
    return found


def with_gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    """Logits on the path that training takes."""
    logits: torch.Tensor = model(**inputs).logits
    assert logits.requires_grad
    return logits.detach().numpy()


def furthest(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    return float(np.abs(one - other).max() / one.std())


@pytest.mark.parametrize(("layout", "kind", "runtime"), runs())
def test_the_artifact_computes_what_was_trained(
    layout: str, kind: str, runtime: str, bench: Callable[[str, str], Bench], tmp_path: Path
) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="the runtime is an extra")
    made, target = bench(layout, kind), target_on(runtime)
    model, before = made.trained(kind), made.student(kind)
    artifact = target.write(target.lower(made.skeleton, model, made.units), tmp_path)
    vocabulary = model_vocabulary(model)
    if vocabulary is not None:
        vocabulary.save(tmp_path)
    allowed = TOLERANCE.get(kind, {}).get(runtime, 2e-5)
    for inputs in made.task.all:
        given = inputs if layout == "bert" else {"input_ids": inputs["input_ids"]}
        found = target.run(artifact, {name: tensor.numpy() for name, tensor in given.items()})
        trained = with_gradients(model, given)
        deviation = furthest(trained, found)
        assert deviation < allowed
        assert furthest(trained, with_gradients(before, given)) > 2 * deviation, (
            "nothing was learnt"
        )


@pytest.mark.parametrize("kind", every_kind())
@pytest.mark.parametrize("layout", ["bert", "llama"])
def test_formats_and_shapes_are_kept(
    layout: str, kind: str, bench: Callable[[str, str], Bench]
) -> None:
    made = bench(layout, kind)
    model = made.trained(kind)
    for unit in made.units:
        option = made.candidates[kind].by_unit.get(unit.name, Option())
        state = unit_state(model, unit)
        if not option_formats(unit, option):
            assert not state, "what was skipped stays skipped"
            continue
        for name, site in state.items():
            expected = option_formats(unit, option)[name]
            assert (site.format.rows, site.format.columns) == (expected.rows, expected.columns)
            assert tuple(site.weight.shape) == (expected.rows, expected.columns)
            assert site.format.weight_bits == expected.weight_bits
            assert site.format.activation_bits == expected.activation_bits


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "zeros" in kind or "half of" in kind])
@pytest.mark.parametrize("layout", ["bert", "llama"])
def test_zeros_stay_zero_and_the_rest_learns(
    layout: str, kind: str, bench: Callable[[str, str], Bench]
) -> None:
    made = bench(layout, kind)
    before = dict(made.student(kind).named_modules())
    masked = 0
    for name, module in made.trained(kind).named_modules():
        mask = getattr(module, "mask", None)
        if not isinstance(module, SparseLinear | QuantLinear) or mask is None:
            continue
        masked += 1
        weight, first = module.weight.detach(), cast(Any, before[name])
        assert torch.equal(mask, first.mask)
        assert not weight[~mask].any(), name
        if isinstance(module, QuantLinear):
            assert not module.codes()[~mask].any(), name
        else:
            assert int(mask.sum()) == module.format.nonzeros
        moved = (weight != first.weight)[mask].float().mean()
        assert moved > 0.9, name
        if kind == "2:4 zeros":
            assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all(), name
    assert masked == (3 * 6 if layout == "bert" else 3 * 7)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "int" in kind])
@pytest.mark.parametrize("layout", ["bert", "llama"])
def test_weights_lie_on_the_grid_they_were_given_and_its_codes_are_exported(
    layout: str, kind: str, bench: Callable[[str, str], Bench]
) -> None:
    made = bench(layout, kind)
    model, before = made.trained(kind), dict(made.student(kind).named_modules())
    lowered = target_on("onnxruntime").lower(made.skeleton, model, made.units)
    stored = [numpy_helper.to_array(t) for t in lowered.graph.initializer if t.data_type == INT8]
    quantised = changed = 0
    for name, module in model.named_modules():
        if not isinstance(module, QuantLinear | QuantEmbedding):
            continue
        quantised += 1
        first, codes, form = cast(Any, before[name]), module.codes(), module.format
        assert torch.equal(module.scales, first.scales), "the grid stays"
        low, high = CODE_RANGE[form.weight_bits]
        assert low <= int(codes.min()) <= int(codes.max()) <= high
        on_grid = dequantise(codes, module.scales, form)
        used = fake_quantise_weight(module.weight, module.scales, form, module.mask)
        assert torch.equal(used.detach(), on_grid), "training used what the codes say"
        if isinstance(module, QuantEmbedding):
            assert torch.equal(codes, first.codes()), "tables are not trained"
        else:
            assert not torch.equal(module.weight, first.weight)
            changed += int((codes != first.codes()).sum())
        if form.weight_bits == 8 and isinstance(module, QuantLinear) and form.nonzeros is None:
            same = (np.array_equal(t, codes) or np.array_equal(t, codes.T) for t in stored)
            assert any(same), name
    assert quantised >= 3 * 6
    assert changed > 20
