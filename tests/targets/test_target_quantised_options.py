"""Quantising options from calibration to the runtime: stored, stitched, lowered, verified."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from target_examples import target

from autocomp.calibrate.stats import load_stats
from autocomp.calibrate.stream import calibrate
from autocomp.core.candidate import Option, Step
from autocomp.core.unit import Unit, dense_format
from autocomp.library.store import Library
from autocomp.models.surgery import install
from autocomp.operators import apply_option, option_formats
from autocomp.operators.protocol import SiteState, UnitState
from autocomp.spec.schema import WorkloadSection
from autocomp.targets.fold_scales import fold_scales
from autocomp.targets.graph import Graph
from autocomp.targets.weights import model_weights

EIGHT = {"weights": 8, "activations": 8, "group": 0}
FOUR = {"weights": 4, "activations": 32, "group": 16}
OPTIONS = {
    "static": [Step.of("gptq", **EIGHT, range="mse")],
    "awq": [Step.of("awq", **FOUR)],
    "awq 8 dynamic": [Step.of("awq_gptq", **EIGHT)],
    "smoothquant": [Step.of("smoothquant", **EIGHT, migration=0.5)],
    "smoothquant static": [Step.of("smoothquant", **EIGHT, migration=0.5, range="percentile")],
    "hqq spared": [Step.of("hqq", **FOUR, spare="output", spare_weights=8)],
    "pruned smoothquant static": [
        Step.of("keep"),
        Step.of("smoothquant", **EIGHT, migration=0.5, range="minmax"),
    ],
    "pruned awq static": [
        Step.of("keep"),
        Step.of("awq", **{**FOUR, "activations": 8}, range="mse"),
    ],
}


def _option(unit: Unit, steps: list[Step]) -> Option:
    """`keep` is half of what the unit has; `spare` is what the unit has."""
    result = []
    for step in steps:
        if step.operator == "keep":
            axis = "heads" if unit.kind == "attention" else "width"
            step = Step.of(axis, keep=(unit.heads or unit.width or 0) // 2)
        if "spare" in dict(step.args) and unit.kind == "ffn":
            step = Step.of(step.operator, **{**dict(step.args), "spare": "down"})
        result.append(step)
    return Option(tuple(result))


def _state(model: torch.nn.Module, unit: Unit) -> UnitState:
    formats = dense_format(unit)
    modules: dict[str, Any] = {s.name: model.get_submodule(s.name) for s in unit.sites}
    return {
        name: SiteState(
            m.weight.detach(), None if m.bias is None else m.bias.detach(), formats[name]
        )
        for name, m in modules.items()
    }


@pytest.fixture(scope="module")
def statistics(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    kept: dict[str, dict[str, Any]] = {}

    def of(layout: str) -> dict[str, Any]:
        if layout not in kept:
            model, units, task, _ = exported(layout)
            directory = tmp_path_factory.mktemp(layout)
            batches = [task.example_inputs(8, 12), task.example_inputs(7, 9)]
            for _ in calibrate(model, units, batches, directory):
                pass
            kept[layout] = {p.stem: load_stats(p) for p in directory.glob("*.safetensors")}
        return kept[layout]

    return of


def _stitched(
    exported: Any, statistics: Any, layout: str, steps: list[Step], root: Path
) -> tuple[Any, Any, Any]:
    """(model through the library, task, skeleton): every sublayer under the option."""
    dense, units, task, skeleton = exported(layout)
    model, library = copy.deepcopy(dense), Library(root)
    for number, unit in enumerate(units):
        if unit.kind not in ("attention", "ffn"):
            continue
        option = _option(unit, steps)
        state = apply_option(unit, _state(model, unit), option, statistics(layout)[unit.name])
        assert {n: s.format for n, s in state.items()} == option_formats(unit, option)
        key = f"{number:040d}"
        library.put(key, state)
        loaded = Library(root).get(key)
        assert loaded is not None
        install(model, unit, loaded)
    return model, task, skeleton


@pytest.mark.parametrize("layout", ["bert", "llama", "vit"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_runtime_computes_what_torch_does(
    exported: Any, statistics: Any, layout: str, name: str, tmp_path: Path
) -> None:
    model, task, skeleton = _stitched(exported, statistics, layout, OPTIONS[name], tmp_path / "lib")
    runtime = target()
    lowered = runtime.lower(skeleton, model, [])
    artifact = runtime.write(lowered, tmp_path)
    inputs = {k: v.numpy() for k, v in task.example_inputs(1, 12).items()}
    with torch.no_grad():
        logits = model(**task.example_inputs(1, 12)).logits
        dense = exported(layout)[0](**task.example_inputs(1, 12)).logits
    spread = float(logits.std())
    # Eight bits: a value may fall on the other side of a rounding step; 4-bit weights widened to
    # 8 bits are rounded once more.
    integers = any(step_bits(step) == 8 for step in OPTIONS[name])
    assert runtime.verify(artifact, model, inputs) < (0.2 if integers else 2e-3) * max(1.0, spread)
    assert float((logits - dense).abs().max()) > 1e-5
    kinds = Counter(node.op_type for node in lowered.graph.node)
    static = any("range" in dict(step.args) for step in OPTIONS[name])
    assert (kinds["QuantizeLinear"] > 0) == static
    if static:
        assert not kinds["DynamicQuantizeLinear"]
        assert not kinds["DynamicQuantizeMatMul"]


@pytest.mark.parametrize("layout", ["bert", "llama"])
@pytest.mark.parametrize("name", OPTIONS)
def test_openvino_computes_what_torch_does(
    exported: Any, statistics: Any, layout: str, name: str, tmp_path: Path
) -> None:
    """Without a range its groups of columns are rounded more finely than torch rounds tensors."""
    pytest.importorskip("openvino", reason="the runtime is an extra")
    from autocomp.targets.openvino_cpu import OpenVinoTarget

    model, task, skeleton = _stitched(exported, statistics, layout, OPTIONS[name], tmp_path / "lib")
    runtime = OpenVinoTarget(WorkloadSection(sequence=12))
    lowered = runtime.lower(skeleton, model, [])
    artifact = runtime.write(lowered, tmp_path)
    inputs = {k: v.numpy() for k, v in task.example_inputs(1, 12).items()}
    with torch.no_grad():
        spread = float(model(**task.example_inputs(1, 12)).logits.std())
    integers = any(step_bits(step) == 8 for step in OPTIONS[name])
    assert runtime.verify(artifact, model, inputs) < (0.2 if integers else 5e-3) * max(1.0, spread)
    kinds = Counter(node.op_type for node in lowered.graph.node)
    static = any("range" in dict(step.args) for step in OPTIONS[name])
    # What query, key and value (and gate and up) read in one range is rounded once, in two layers.
    assert kinds["FakeQuantize"] == (2 * 4 if static else 0)


def step_bits(step: Step) -> int:
    return int(dict(step.args).get("activations", 32))


@pytest.mark.parametrize("layout", ["bert", "llama", "vit"])
def test_scales_cost_nothing_where_a_norm_comes_right_before(
    exported: Any, statistics: Any, layout: str, tmp_path: Path
) -> None:
    _, _, _, skeleton = exported(layout)
    model, _, _ = _stitched(exported, statistics, layout, OPTIONS["smoothquant"], tmp_path)
    multiplications = [
        Counter(node.op_type for node in graph.graph.node)["Mul"]
        for graph in (target().lower(skeleton, model, []), skeleton)
    ]
    added = multiplications[0] - multiplications[1]
    # Post-norm: one for query, key and value, one for the feed-forward sublayer, in two layers.
    assert added == (4 if layout == "bert" else 0)


def test_sites_share_codes_and_range_in_the_graph(
    exported: Any, statistics: Any, tmp_path: Path
) -> None:
    model, _, skeleton = _stitched(exported, statistics, "llama", OPTIONS["static"], tmp_path)
    lowered = target().lower(skeleton, model, [])
    kinds = Counter(node.op_type for node in lowered.graph.node)
    assert kinds["MatMulIntegerToFloat"] == 2 * 7
    assert kinds["QuantizeLinear"] == 2 * 4  # q k v, output, gate up, down
    site = model_weights(model)("model.layers.0.self_attn.q_proj")
    assert site is not None
    assert site.input_range is not None
    node = next(node for node in lowered.graph.node if node.op_type == "QuantizeLinear")
    constants = {t.name: numpy_helper.to_array(t) for t in lowered.graph.initializer}
    low, high = site.input_range
    scale = np.float32((high - low) / 255)
    assert constants[node.input[1]] == scale
    assert constants[node.input[2]] == np.uint8(np.rint(-low / scale))
    assert constants[node.input[2]].dtype == np.uint8


def test_a_static_range_clips_and_trains_straight_through(
    exported: Any, statistics: Any, tmp_path: Path
) -> None:
    model, task, _ = _stitched(
        exported, statistics, "bert", OPTIONS["smoothquant static"], tmp_path
    )
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model(**task.example_inputs(4, 12)).logits.square().sum().backward()
    site = model.get_submodule("bert.encoder.layer.0.intermediate.dense")
    assert site.weight.grad is not None
    assert torch.isfinite(site.weight.grad).all()
    assert (site.weight.grad != 0).any()
    assert {name for name, _ in site.named_parameters()} == {"weight", "bias"}


def _norm_graph(vectors: list[list[float]], kind: str, residual: bool) -> Graph:
    nodes = [
        helper.make_node(
            kind, ["x", "gamma", *(["beta"] if kind[0] == "L" else [])], ["n"], axis=-1
        )
    ]
    constants = [("gamma", [1.0, 2.0, 3.0]), ("beta", [0.1, 0.2, 0.3])]
    for index, vector in enumerate(vectors):
        constants.append((f"t{index}", vector))
        nodes.append(helper.make_node("Mul", ["n", f"t{index}"], [f"m{index}"]))
        nodes.append(helper.make_node("Neg", [f"m{index}"], [f"y{index}"]))
    outputs = [f"y{index}" for index in range(len(vectors))]
    if residual:
        nodes.append(helper.make_node("Add", ["n", "x"], ["r"]))
        outputs.append("r")
    graph = helper.make_graph(
        nodes,
        "norm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 3]) for name in outputs],
        [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in constants],
    )
    return Graph(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    )


@pytest.mark.parametrize("kind", ["LayerNormalization", "RMSNormalization"])
@pytest.mark.parametrize(
    ("vectors", "residual", "expected"),
    [
        ([[2.0, 3.0, 4.0]], False, 1),
        ([[2.0, 3.0, 4.0], [2.0, 3.0, 4.0]], False, 1),
        ([[2.0, 3.0, 4.0], [2.0, 3.0, 5.0]], False, 0),
        ([[2.0, 3.0, 4.0]], True, 0),
    ],
)
def test_folding_changes_nothing_but_the_norm(
    kind: str, vectors: list[list[float]], residual: bool, expected: int
) -> None:
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    graph = _norm_graph(vectors, kind, residual)
    names = graph.outputs
    before = target().run_graph(graph.model, {"x": x}, names)
    assert fold_scales(graph) == expected
    graph.prune()
    muls = [node for node in graph.nodes if node.op_type == "Mul"]
    assert len(muls) == (0 if expected else len(vectors))
    after = target().run_graph(graph.to_model(), {"x": x}, names)
    for name in names:
        np.testing.assert_allclose(after[name], before[name], rtol=1e-5, atol=1e-6)
