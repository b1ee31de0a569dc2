"""Graphs with a key-value cache against torch without one: prompts, single tokens, generation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from reduced import keep_heads, keep_width
from target_examples import TextTask, quantise_unit, small_model

from autocomp.core.errors import InternalError
from autocomp.core.unit import dense_format, resized
from autocomp.models.surgery import skip
from autocomp.spec.schema import WorkloadSection
from autocomp.targets.cache import add_cache
from autocomp.targets.generation import PAST, carried, feeds, first_tokens, generate
from autocomp.targets.graph import Graph
from autocomp.targets.onnxruntime_cpu import OnnxRuntimeTarget, open_session
from autocomp.targets.profile import profile
from autocomp.targets.skeleton_format import DOMAIN
from autocomp.targets.skeleton_store import skeleton_key

TASK = TextTask(masked=False)
PROMPT, NEW = 9, 12


def target(**workload: int) -> OnnxRuntimeTarget:
    return OnnxRuntimeTarget(WorkloadSection(prompt=PROMPT, generate=NEW, **workload))


@pytest.fixture(scope="session")
def llama() -> tuple[Any, Any, Any]:
    """(model, units, skeleton with a cache) of a small Llama with grouped queries.

    Its head is its own: a random one that shares the table's weight only repeats its input.
    """
    model, units, _ = small_model("llama", tie_word_embeddings=False)
    model.config.use_cache = False
    return model, units, target().export(model, units, TASK)


def _unit(units, name):
    return next(unit for unit in units if unit.name == name)


def _dense(model, units) -> None:
    pass


def _pruned(model, units) -> None:
    keep_heads(model, _unit(units, "layers.1.attention"), [2, 3])
    keep_width(model, _unit(units, "layers.0.ffn"), list(range(0, 64, 2)))


def _first_skipped(model, units) -> None:
    skip(model, _unit(units, "layers.0.attention"))


def _no_attention(model, units) -> None:
    skip(model, _unit(units, "layers.0.attention"))
    skip(model, _unit(units, "layers.1.attention"))


def _bits(bits: int, group: int | None) -> Callable[[Any, Any], None]:
    def change(model, units) -> None:
        for unit in units:
            quantise_unit(model, unit, bits, 16 if unit.kind == "embedding" else group, 32)

    return change


def _mixed(model, units) -> None:
    _pruned(model, units)
    _first_skipped(model, units)
    quantise_unit(model, _unit(units, "layers.1.attention"), 4, 16, 32)
    quantise_unit(model, _unit(units, "layers.1.ffn"), 8, None, 32)


CHANGES = {
    "dense": _dense,
    "int8": _bits(8, None),
    "int4": _bits(4, 16),
    "pruned": _pruned,
    "first attention skipped": _first_skipped,
    "every attention skipped": _no_attention,
    "mixed": _mixed,
}


def in_pieces(session: Any, ids: np.ndarray, cuts: list[int]) -> np.ndarray:
    """Logits of `ids` read piece by piece, what one leaves in the cache given to the next."""
    first = feeds(session, {"input_ids": ids})
    pasts = carried(first)
    past = {name: first[name] for name in pasts}
    names = ["logits", *pasts.values()]
    parts = []
    for piece in np.split(ids, cuts, axis=1):
        logits, *present = session.run(names, {"input_ids": piece, **past})
        past = dict(zip(past, present, strict=True))
        parts.append(logits)
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_equals_torch_without_a_cache(llama, change, tmp_path):
    dense, units, skeleton = llama
    model = copy.deepcopy(dense)
    change(model, units)
    artifact = target().write(target().lower(skeleton, model, units), tmp_path)
    ids = TASK.example_inputs(3, 14)["input_ids"]
    assert target().verify(artifact, model, {"input_ids": ids.numpy()}) < 1e-4  # empty past

    session = open_session(artifact.path, 1)
    with torch.no_grad():
        whole = model(input_ids=ids).logits.numpy()
        prompt = ids[:, :PROMPT]
        expected = model.generate(
            prompt, max_new_tokens=NEW, do_sample=False, use_cache=False, eos_token_id=None
        )[:, PROMPT:]
    found = in_pieces(session, ids.numpy(), [5, 6, 7, 10])
    assert np.abs(found - whole).max() < 1e-4
    new = generate(session, {"input_ids": prompt.numpy()}, NEW)
    np.testing.assert_array_equal(new, expected.numpy())
    assert len(np.unique(new)) > 3


def test_caches_follow_the_candidate(llama):
    dense, units, skeleton = llama
    model = copy.deepcopy(dense)
    _mixed(model, units)
    lowered = target().lower(skeleton, model, units)
    shapes = {
        value.name: [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
        for value in (*lowered.graph.input, *lowered.graph.output)
    }
    cache = ["batch", 1, "past", 8]  # one of two groups is left; layer 0 attends no more
    assert shapes.pop("past_key_values.1.key") == shapes.pop("past_key_values.1.value") == cache
    assert shapes.pop("present.1.key") == shapes.pop("present.1.value") == [
        "batch", 1, "total", 8
    ]  # fmt: skip
    assert list(shapes) == ["input_ids", "logits"]
    assert [v.name for v in skeleton.graph.input if v.name.startswith(PAST)] == [
        f"past_key_values.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")
    ]  # the skeleton is as it was
    _no_attention(model, units)
    lowered = target().lower(skeleton, model, units)
    assert [value.name for value in lowered.graph.input] == ["input_ids"]


@pytest.mark.parametrize("layout", ["gpt2", "qwen3"])
def test_other_layouts_count_positions_too(layout):
    """GPT-2 looks positions up in a table; Qwen3 norms every head before it rotates."""
    model, units, _ = small_model(layout)
    lowered = target().lower(target().export(model, units, TASK), model, units)
    ids = TASK.example_inputs(2, 14)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits.numpy()
    session = open_session(lowered.SerializeToString(), 1)
    assert np.abs(in_pieces(session, ids.numpy(), [8, 9, 12]) - whole).max() < 1e-4


def test_attention_that_looks_ahead_has_no_cache():
    node = helper.make_node(
        "Attention", ["q", "k", "v"], ["y"], domain=DOMAIN, layer=0, head_dim=8, causal=0
    )
    graph = Graph(helper.make_model(helper.make_graph([node], "g", [], [])))
    with pytest.raises(InternalError, match="only causal attention"):
        add_cache(graph)


def test_skeletons_with_and_without_a_cache_are_kept_apart(llama):
    model, units, _ = llama
    assert skeleton_key(model, units, TASK) != skeleton_key(model, units, TASK, decode=True)


def test_positions_are_counted_where_every_attention_is_skipped():
    """GPT-2 has learnt positions, which a counter of its own then gives."""
    model, units, _ = small_model("gpt2")
    skeleton = target().export(model, units, TASK)
    _no_attention(model, units)
    lowered = target().lower(skeleton, model, units)
    assert [value.name for value in lowered.graph.input] == ["input_ids", "past_length"]
    assert [value.name for value in lowered.graph.output] == ["logits", "present_length"]
    ids = TASK.example_inputs(2, 14)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits.numpy()
    session = open_session(lowered.SerializeToString(), 1)
    assert np.abs(in_pieces(session, ids.numpy(), [8, 9, 12]) - whole).max() < 1e-4


def test_measured_is_a_token_in_the_middle_of_the_generation(llama, tmp_path, monkeypatch):
    model, units, skeleton = llama
    runtime = target(batch=2)
    artifact = runtime.write(runtime.lower(skeleton, model, units), tmp_path)
    fed = []

    class Session:
        def __init__(self, path, threads):
            self.real = open_session(path, threads)
            self.get_inputs = self.real.get_inputs

        def run(self, names, feed):
            if "input_ids" in feed:
                fed.append((feed["input_ids"].shape, feed[f"{PAST}1.key"].shape))
            return self.real.run(names, feed)

    monkeypatch.setattr("autocomp.targets.onnxruntime_cpu.open_session", Session)
    inputs = {k: v.numpy() for k, v in TASK.example_inputs(2, 5).items()}
    found = runtime.measure(artifact, inputs)
    assert set(fed) == {((2, 1), (2, 2, 9 + 6, 8)), ((2, 9), (2, 2, 0, 8))}
    assert found.latency_ms is not None
    assert found.prefill_ms is not None
    assert 0 < found.latency_ms < found.prefill_ms
    assert runtime.describe()["workload"] == {
        "batch": 2, "sequence": 128, "prompt": 9, "generate": 12, "threads": 1,
    }  # fmt: skip
    assert runtime.tokens == 2
    assert runtime.fingerprint() != OnnxRuntimeTarget(WorkloadSection(batch=2)).fingerprint()


def test_peak_memory_holds_the_cache(llama, tmp_path):
    """The prompt is read and continued: a longer one must show by its scores of attention."""
    model, units, skeleton = llama
    inputs = {k: v.numpy() for k, v in TASK.example_inputs(1, 9).items()}
    artifact = target().write(target().lower(skeleton, model, units), tmp_path)
    long = OnnxRuntimeTarget(WorkloadSection(prompt=1500, generate=2))
    added = long.peak_memory(artifact, inputs) - target().peak_memory(artifact, inputs)
    assert added > 4 * 4 * 1500 * 1500


def test_a_table_of_costs_knows_pruned_caches(llama):
    _, units, skeleton = llama
    formats = {}
    for unit in units:
        dense = dense_format(unit)
        formats[unit.name] = {"dense": dense}
        if unit.kind == "attention":
            half = {
                site.name: resized(dense[site.name], columns=16)
                if site.role == "output"
                else resized(dense[site.name], rows=site.rows // 2)
                for site in unit.sites
            }
            formats[unit.name] |= {"half": half, "skip": {}}
    inputs = {k: v.numpy() for k, v in TASK.example_inputs(1, 9).items()}
    table = profile(target(), skeleton, units, formats, inputs, candidates=2)
    attention = table.entries["layers.0.attention"]
    assert attention["skip"].latency_ms == 0 < attention["half"].latency_ms
    assert attention["dense"].size_bytes > attention["half"].size_bytes
    assert len(table.pairs) == 3


def test_feeds_are_what_the_session_asks_for():
    node = helper.make_node("Identity", [f"{PAST}3.key"], ["y"])
    values = [
        helper.make_tensor_value_info(f"{PAST}3.key", TensorProto.FLOAT, ["b", 2, "p", 4]),
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opset = helper.make_opsetid("", 20)
    graph = helper.make_graph([node], "g", values, [output])
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    session = open_session(model.SerializeToString(), 1)
    ids = np.arange(6).reshape(3, 2)
    found = feeds(session, {"input_ids": ids, "unused": ids})
    assert {name: value.shape for name, value in found.items()} == {
        f"{PAST}3.key": (3, 2, 0, 4), "input_ids": (3, 2),
    }  # fmt: skip
    assert feeds(session, {"input_ids": ids}, 1, 7)[f"{PAST}3.key"].shape == (1, 2, 7, 4)
    longer = first_tokens({"input_ids": ids, "other": ids}, 5)
    assert longer["input_ids"].tolist() == [[0, 1, 0, 1, 0], [2, 3, 2, 3, 2], [4, 5, 4, 5, 4]]
    assert longer["other"] is ids
    assert first_tokens({"input_ids": ids}, 1)["input_ids"].tolist() == [[0], [2], [4]]
