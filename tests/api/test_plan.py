"""What a plan says of sizes, against exported models; the predictor, against its own table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from autocomp.api.plan import Plan, check_floor, check_generation, check_on_policy
from autocomp.api.predictor import TablePredictor
from autocomp.core.candidate import Option, Step
from autocomp.core.errors import SpecError
from autocomp.core.measurement import Measurement
from autocomp.models.discover import find_units
from autocomp.models.load import load_model
from autocomp.models.sources import read_config, read_tensor_shapes
from autocomp.spec.loader import load_spec
from autocomp.spec.schema import WorkloadSection
from autocomp.targets.cost_table import CostTable, Entry
from autocomp.targets.onnxruntime_cpu import OnnxRuntimeTarget
from autocomp.tasks.inspect import DataSummary

LABELS = 3
CONFIG = {
    "vocab_size": 1500,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
}


class TextInputs:
    """The part of a task that exporting needs."""

    dynamic_axes = {  # noqa: RUF012
        name: {0: "batch", 1: "sequence"}
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }

    def example_inputs(self, batch: int, sequence: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(batch * sequence).reshape(batch, sequence) + 5
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
        }


def plan_of(path: Path) -> Plan:
    config, shapes = read_config(path), read_tensor_shapes(path)
    units = tuple(find_units(config, shapes, "text-classification", LABELS))
    loaded: Any = None
    data = DataSummary(10, ("a", "b", "c"))
    return Plan(loaded, path, config, shapes, data, units, {}, {})


@pytest.mark.parametrize("head", [False, True], ids=["headless", "with head"])
def test_sizes_add_up_to_the_exported_dense_model(tmp_path: Path, head: bool) -> None:
    torch.manual_seed(0)
    config = BertConfig(**CONFIG, num_labels=LABELS)
    made = AutoModelForSequenceClassification.from_config(config) if head else BertModel(config)
    made.save_pretrained(tmp_path)
    plan = plan_of(tmp_path)
    estimated = plan.rest_bytes + 4 * sum(unit.parameters for unit in plan.units)

    model = load_model(tmp_path, "text-classification", LABELS)
    target = OnnxRuntimeTarget(WorkloadSection(sequence=16))
    skeleton = target.export(model, plan.units, TextInputs())
    written = target.write(target.lower(skeleton, model, plan.units), tmp_path / "out")
    assert estimated == pytest.approx(written.size_bytes, rel=0.02)
    assert estimated == 4 * sum(parameter.numel() for parameter in model.parameters())


def step(bits: int) -> Option:
    return Option((Step.of("rtn", weights=bits, activations=32, group=0),))


UNITS = ("layers.0.ffn", "layers.1.ffn")
CHOICES = (Option(), step(8), step(4), Option((Step.of("skip"),)))


def table() -> CostTable:
    entries = {
        unit: {
            option.key: Entry(
                latency_ms=(0.2 + 0.1 * at) * (3 - i),
                size_bytes=1000 * (3 - i),
                kernels="" if i == 3 else "int8" if i else "float",
            )
            for i, option in enumerate(CHOICES)
        }
        for at, unit in enumerate(UNITS)
    }
    return CostTable("d", {}, entries, base_ms=0.5, rest_bytes=700)


def measured(option: Option, other: Option, latency_ms: float) -> tuple[Any, Measurement]:
    return dict(zip(UNITS, (option, other), strict=True)), Measurement("measured", latency_ms, 1)


def assert_linear(predictor: TablePredictor) -> None:
    for one in CHOICES:
        for other in CHOICES:
            options = dict(zip(UNITS, (one, other), strict=True))
            whole = predictor.predict(options)
            terms = [predictor.latency_ms(unit, option) for unit, option in options.items()]
            assert whole.latency_ms == pytest.approx(predictor.base_latency_ms + sum(terms))
            sizes = [predictor.size_bytes(unit, option) for unit, option in options.items()]
            assert whole.size_bytes == predictor.base_size_bytes + sum(sizes)
            assert whole.provenance == "estimated"


def test_the_linear_terms_add_up_to_the_prediction() -> None:
    assert_linear(TablePredictor(table()))


def test_measurements_pull_the_prediction_towards_them_and_leave_it_linear() -> None:
    predictor = TablePredictor(table())
    truth = [measured(a, b, 1.2 * predictor.predict({UNITS[0]: a, UNITS[1]: b}).latency_ms)
             for a in CHOICES for b in CHOICES]  # fmt: skip
    refitted = predictor.refitted(truth)
    assert_linear(refitted)
    for options, cost in truth:
        before = abs(predictor.predict(options).latency_ms - cost.latency_ms)
        assert abs(refitted.predict(options).latency_ms - cost.latency_ms) < 0.5 * before


def test_measurements_of_options_the_table_lacks_are_left_out() -> None:
    predictor = TablePredictor(table())
    strange = measured(step(2), Option(), 99.0)
    options = dict(zip(UNITS, CHOICES, strict=False))
    assert predictor.refitted([strange]).predict(options) == predictor.predict(options)


GENERATES = """\
version: 1
model: {source: some/model}
task: {name: language-modeling, data: {source: some-text}}
target:
  workload:
    prompt: 100
    generate: 28
budget: {latency: 50%}
space: [{match: "*"}]
"""


def test_a_workload_that_generates_needs_positions_and_a_language_model(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(GENERATES)
    spec = load_spec(tmp_path / "spec.yaml")
    check_generation(spec, {"max_position_embeddings": 128})
    check_generation(spec, {})
    place = r"spec\.yaml:7 target\.workload\.generate: "
    with pytest.raises(SpecError, match=f"{place}100 tokens of prompt and 28 generated are more"):
        check_generation(spec, {"max_position_embeddings": 127})
    other = load_spec(tmp_path / "spec.yaml", {"task.name": "text-classification"})
    with pytest.raises(SpecError, match=f"{place}task 'text-classification' generates no tokens"):
        check_generation(other, {})


def test_a_floor_speaks_of_the_metric_of_its_task(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(GENERATES)
    floor = {"budget.quality": "perplexity 50"}
    check_floor(load_spec(tmp_path / "spec.yaml", floor))
    other = {"task.name": "text-classification"}
    check_floor(load_spec(tmp_path / "spec.yaml", {**other, "budget.quality": "98%"}))
    with pytest.raises(SpecError, match=r"budget\.quality: this task is not scored by perplexity"):
        check_floor(load_spec(tmp_path / "spec.yaml", {**other, **floor}))


def test_only_a_language_model_is_trained_on_its_own_text(tmp_path: Path) -> None:
    text = GENERATES + "distill: {on_policy: [0.0, 0.5]}\n"
    (tmp_path / "spec.yaml").write_text(text)
    check_on_policy(load_spec(tmp_path / "spec.yaml"))
    other = {"task.name": "text-classification"}
    place = rf"spec\.yaml:{len(text.splitlines())} distill\.on_policy\[1\]: 0\.5 of the batches"
    with pytest.raises(SpecError, match=f"{place} .* task 'text-classification' writes none"):
        check_on_policy(load_spec(tmp_path / "spec.yaml", other))
    check_on_policy(load_spec(tmp_path / "spec.yaml", {**other, "distill.on_policy": [0.0]}))
