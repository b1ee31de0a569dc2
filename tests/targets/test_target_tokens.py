"""Merged and dropped tokens in lowered graphs, and what they do to the cost table."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import target_examples
from reduced import keep_heads
from target_examples import RUNTIMES, ImageTask, small_model, target, target_on

from autocomp.core.errors import InternalError
from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import dense_format
from autocomp.models.surgery import skip
from autocomp.models.tokens import install_tokens
from autocomp.targets.cost_table import CostTable, Entry
from autocomp.targets.graph import attribute
from autocomp.targets.openvino_pieces import OPENVINO
from autocomp.targets.profile import check_table, profile
from autocomp.targets.skeleton_store import skeleton_key
from autocomp.targets.token_costs import TokenCosts, measured_lengths
from autocomp.targets.token_profile import token_costs
from autocomp.targets.weights import model_weights

SIDE = 48
TOME, DROP = TokenReduction("tome", 0.25), TokenReduction("token_prune", 0.25)
FUSE = TokenReduction("token_fuse", 0.25)


@pytest.fixture(scope="module")
def vision():
    """Layout → (model of 36 patches and three blocks, units, task, skeleton)."""
    kept = {}

    def make(layout):
        if layout not in kept:
            with pytest.MonkeyPatch.context() as patch:
                config = target_examples.CONFIGS[layout]
                changes = {"image_size": SIDE, "num_hidden_layers": 3}
                patch.setitem(target_examples.CONFIGS, layout, {**config, **changes})
                model, units, _ = small_model(layout)
            task = ImageTask(SIDE)
            kept[layout] = (model, units, task, target().export(model, units, task))
        return kept[layout]

    return make


@pytest.mark.parametrize("runtime_name", RUNTIMES)
@pytest.mark.parametrize("layout", ["vit", "deit", "dinov2"])
@pytest.mark.parametrize(
    "reductions",
    [
        {0: TOME, 1: TOME, 2: TOME},
        {0: DROP, 2: DROP},
        {0: TokenReduction("tome", 0.5), 1: DROP, 2: TokenReduction("tome", 0.4)},
        {0: FUSE, 1: TOME, 2: FUSE},
        {1: TokenReduction("tome", 0.01), 2: TokenReduction("token_fuse", 0.03)},
    ],
    ids=["merged", "dropped", "both", "fused", "nothing"],
)
def test_lowered_equals_torch(vision, layout, reductions, runtime_name, tmp_path: Path):
    dense, units, task, skeleton = vision(layout)
    model = copy.deepcopy(dense)
    keep_heads(model, units[0], [0, 2])
    skip(model, units[1])
    leading = units[0].protected_tokens
    install_tokens(
        model,
        units,
        {f"layers.{k}.attention": replace(r, protected=leading) for k, r in reductions.items()},
    )
    runtime = target_on(runtime_name)
    lowered = runtime.lower(skeleton, model, units)
    known = {"", "com.microsoft" if runtime_name == "onnxruntime" else OPENVINO}
    assert {node.domain for node in lowered.graph.node} <= known
    artifact = runtime.write(lowered, tmp_path)
    for batch in (1, 3):
        inputs = {k: v.numpy() for k, v in task.example_inputs(batch, 0).items()}
        assert runtime.verify(artifact, model, inputs) < 1e-4


def test_every_later_unit_runs_on_fewer_tokens(vision):
    model, units, task, skeleton = vision("vit")
    student = copy.deepcopy(model)
    install_tokens(student, units, {"layers.0.attention": TOME, "layers.1.attention": DROP})
    lowered = target().lower(skeleton, student, units)
    names = [n.output[0] for n in lowered.graph.node if n.op_type == "Gelu"]
    for name in names:
        lowered.graph.output.append(onnx.ValueInfoProto(name=name))
    inputs = {k: v.numpy() for k, v in task.example_inputs(2, 0).items()}
    values = target().run_graph(lowered, inputs, names)
    assert [value.shape[1] for value in values.values()] == [28, 22, 22]


def test_a_marker_without_a_reduction_leaves_nothing(vision):
    model, units, _, skeleton = vision("dinov2")
    before = skeleton.SerializeToString()
    lowered = target().lower(skeleton, model, units)
    assert not {n.op_type for n in lowered.graph.node} & {"Identity", "TopK", "ScatterElements"}
    assert not [n for n in lowered.graph.node if n.domain == "autocomp"]
    assert not [t.name for t in lowered.graph.initializer if "tokens" in t.name]
    student = copy.deepcopy(model)
    install_tokens(student, units, {"layers.1.attention": TOME})
    target().lower(skeleton, student, units)
    assert skeleton.SerializeToString() == before


def test_text_has_no_markers(exported):
    _, _, _, skeleton = exported("bert")
    assert not [n for n in skeleton.graph.node if n.op_type in ("Tokens", "AveragedTokens")]


def test_a_unit_without_a_marker_is_refused(exported):
    model, *_, skeleton = exported("bert")
    with pytest.raises(InternalError, match=r"no place .* behind layers\.0\.attention"):
        target().lower_weights(
            skeleton, model_weights(model), reductions={"layers.0.attention": TOME}
        )


def test_a_skeleton_holds_for_one_image_size(vision):
    model, units, task, _ = vision("dinov2")
    assert skeleton_key(model, units, task) == skeleton_key(model, units, ImageTask(SIDE))
    assert skeleton_key(model, units, task) != skeleton_key(model, units, ImageTask(16))


def _table() -> CostTable:
    """Two blocks; attention costs t² / 100, ffn t / 10, the merge 0.5 + t / 100 at t tokens."""
    lengths = (9, 13, 17)
    quadratic, linear = [t * t / 100 for t in lengths], [t / 10 for t in lengths]
    units = {f"layers.{i}.{kind}": kind for i in range(2) for kind in ("attention", "ffn")}
    keys = ("dense", "tome")
    entries = {
        unit: {
            "dense": Entry((quadratic if kind == "attention" else linear)[-1], 100, "float"),
            **({"tome": Entry(quadratic[-1], 120, "float")} if kind == "attention" else {}),
            "skip": Entry(0.0, 0, ""),
        }
        for unit, kind in units.items()
    }
    entries["head"] = {"dense": Entry(0.3, 10, "float")}
    curves = {
        unit: dict.fromkeys(keys, quadratic if kind == "attention" else linear)
        for unit, kind in units.items()
    }
    reductions = {u: {"tome": TOME} for u, kind in units.items() if kind == "attention"}
    tokens = TokenCosts(
        lengths, curves, reductions, {"tome 0.25 1": [0.5 + t / 100 for t in lengths]}
    )
    return CostTable("device", {}, entries, base_ms=1.0, rest_bytes=0, tokens=tokens)


def _truth(choice: dict[str, str]) -> float:
    """The cost by the formulas `_table` is made from; 17 → 13 → 10 tokens."""
    tokens, total = 17, 1.0
    for unit, key in choice.items():
        if unit == "head":
            total += 0.3
        elif key != "skip":
            ninth = {17: 2.89, 13: 1.69, 10: 0.81 + (1.69 - 0.81) / 4}[tokens]
            total += ninth if unit.endswith("attention") else tokens / 10
        if key == "tome":
            total += 0.5 + tokens / 100
            tokens = {17: 13, 13: 10}[tokens]
    return total


def _choices() -> list[dict[str, str]]:
    table = _table()
    return [
        dict(zip(table.entries, keys, strict=True))
        for keys in itertools.product(*table.entries.values())
    ]


def test_prediction_walks_the_units_with_the_tokens_they_see():
    table = _table()
    for choice in _choices():
        assert table.predict(choice).latency_ms == pytest.approx(_truth(choice))


def test_linear_terms_are_exact_for_one_merge_over_typical_units():
    """Behind layer 1's attention is one ffn with options dense and skip: half its saving."""
    table = _table()
    saving = 0.5 * (1.7 - 1.3)
    assert table.latency_ms("layers.1.attention", "tome") == pytest.approx(2.89 + 0.67 - saving)
    assert table.latency_ms("layers.1.attention", "dense") == pytest.approx(2.89)


def test_measured_candidates_correct_it_and_it_survives_the_disk(tmp_path: Path):
    table = _table()
    table.fit([(choice, 1.2 * _truth(choice)) for choice in _choices()[::3]])
    errors = [
        table.predict(choice).latency_ms / (1.2 * _truth(choice)) - 1 for choice in _choices()
    ]
    assert np.abs(errors).max() < 0.03
    table.save(tmp_path / "table.json")
    loaded = CostTable.load(tmp_path / "table.json")
    for choice in _choices():
        assert loaded.predict(choice) == table.predict(choice)


def test_lengths_go_from_the_shortest_a_candidate_can_reach():
    reductions = {
        "layers.0.attention": {"a": TOME, "b": TokenReduction("token_prune", 0.5)},
        "layers.1.attention": {"a": TOME},
    }
    assert measured_lengths(reductions, 17) == (7, 12, 17)
    assert measured_lengths({"layers.0.attention": {"a": TokenReduction("tome", 0.01)}}, 17) == (
        17,
    )


def test_a_reduction_that_removes_nothing_at_a_length_is_taken_to_cost_what_it_does_beyond():
    """A tenth of 8 patches is none; between 9 and 17 tokens one goes, and that costs as much."""
    reduction = TokenReduction("tome", 0.1)
    times = {("tome 0.1 1", 17): 0.2, ("tome 0.1 1", 13): 0.18}
    costs = token_costs((9, 13, 17), {}, {"layers.0.attention": {"tome": reduction}}, times)
    assert costs.own == {"tome 0.1 1": (0.18, 0.18, 0.2)}
    assert costs.own_ms(reduction, 12) == pytest.approx(0.18)
    assert costs.own_ms(reduction, 9) == 0.0


def test_profiling_at_several_lengths(vision, tmp_path: Path, monkeypatch):
    _, units, task, skeleton = vision("dinov2")
    formats, reductions = {}, {}
    for unit in units:
        formats[unit.name] = {"dense": dense_format(unit)}
        if unit.skippable:
            formats[unit.name]["skip"] = {}
        if unit.kind == "attention":
            formats[unit.name] |= {"tome": dense_format(unit), "drop": dense_format(unit)}
            reductions[unit.name] = {"tome": TOME, "drop": FUSE}
    runtime = target()
    inputs = {name: value.numpy() for name, value in task.example_inputs(1, 0).items()}
    timed: list[int] = []
    time_pieces = runtime.time_pieces

    def counted(pieces, **settings):
        timed.append(len(pieces))
        return time_pieces(pieces, **{**settings, "rounds": 20})

    monkeypatch.setattr(runtime, "time_pieces", counted)
    table = profile(runtime, skeleton, units, formats, inputs, reductions=reductions, candidates=1)
    costs = table.tokens
    assert costs is not None
    assert costs.lengths == (17, 27, 37)
    # attention and ffn at three lengths, the head at one; two reductions at three lengths
    assert timed == [2 * 3 + 1 + 2 * 3]
    assert set(costs.curves["layers.0.ffn"]) == {"dense"}
    assert costs.curves["head"] == {}
    assert (
        costs.curves["layers.0.attention"]["tome"][-1]
        == table.entry("layers.0.attention", "tome").latency_ms
    )
    assert min(costs.own["tome 0.25 1"]) > 0
    merged = table.entry("layers.0.attention", "tome").size_bytes
    assert merged > table.entry("layers.0.attention", "dense").size_bytes
    accuracy = check_table(
        table, runtime, skeleton, units, formats, inputs, reductions=reductions, candidates=2
    )
    assert len(accuracy.pairs) == 2
    timed.clear()
    plain = {
        unit: {k: f for k, f in o.items() if k not in ("tome", "drop")}
        for unit, o in formats.items()
    }
    without = profile(runtime, skeleton, units, plain, inputs, candidates=0)
    assert timed == [3]
    assert without.tokens is None
    without.save(tmp_path / "table.json")
    assert '"tokens"' not in (tmp_path / "table.json").read_text()
    assert [n for n in skeleton.graph.node if attribute(n, "tokens") == 37]
