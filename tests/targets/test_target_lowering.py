"""Lowered graphs against torch: dense, stitched and quantised models of every layout."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from reduced import keep_heads, keep_width
from target_examples import TextTask, quantise_unit, small_model, target

from autocomp.calibrate.stats import SiteStats
from autocomp.core.candidate import Option, Step
from autocomp.core.errors import InternalError
from autocomp.core.unit import SiteFormat, dense_format
from autocomp.models.surgery import install, skip
from autocomp.operators import apply_option, option_formats
from autocomp.operators.protocol import SiteState
from autocomp.targets.graph import Graph, attribute
from autocomp.targets.skeleton_store import cached_skeleton
from autocomp.targets.weights import SiteWeights, model_parameters, model_weights

LAYOUTS = ("bert", "llama", "qwen3", "gpt2", "vit", "dinov2")


def _difference(exported, model, skeleton, task, tmp_path, shapes=((1, 12), (4, 9))) -> float:
    runtime = target()
    artifact = runtime.write(runtime.lower(skeleton, model, []), tmp_path)
    return max(
        runtime.verify(
            artifact, model, {k: v.numpy() for k, v in task.example_inputs(*shape).items()}
        )
        for shape in shapes
    )


def _unit(units, name):
    return next(unit for unit in units if unit.name == name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_equals_torch_at_every_shape(exported, layout, tmp_path):
    model, _, task, skeleton = exported(layout)
    shapes = ((1, 12), (4, 12), (1, 1), (3, 31))
    assert _difference(exported, model, skeleton, task, tmp_path, shapes) < 1e-4


def test_heads_that_cannot_be_joined_stay_apart(tmp_path, monkeypatch):
    """Qwen3 normalises each head; without joining them again, rotary and attention see four axes,
    and fewer heads still fit."""
    monkeypatch.setattr(Graph, "joined_heads", lambda self, tensor: None)
    model, units, task = small_model("qwen3")
    skeleton = target().export(model, units, task)
    flat = [attribute(n, "flat") for n in skeleton.graph.node if n.op_type == "Attention"]
    assert flat == [0, 0]
    assert _difference(None, model, skeleton, task, tmp_path) < 1e-4
    keep_heads(model, _unit(units, "layers.0.attention"), [2, 3])
    assert _difference(None, model, skeleton, task, tmp_path) < 1e-4


def test_norms_of_single_heads_leave_attention_whole(exported):
    skeleton = exported("qwen3")[-1]
    nodes = [n for n in skeleton.graph.node if n.op_type == "Attention"]
    assert [attribute(n, "flat") for n in nodes] == [1, 1]


def test_text_without_a_mask_is_whole_sequences(tmp_path):
    """As language modelling exports: the only input is `input_ids`."""
    model, units, _ = small_model("llama")
    task = TextTask(masked=False)
    skeleton = target().export(model, units, task)
    assert [value.name for value in skeleton.graph.input] == ["input_ids"]
    shapes = ((1, 12), (4, 12), (1, 1), (3, 31))
    assert _difference(None, model, skeleton, task, tmp_path, shapes) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stitched_equals_torch(exported, layout, tmp_path):
    dense, units, task, skeleton = exported(layout)
    model = copy.deepcopy(dense)
    attention = _unit(units, "layers.0.attention")
    per_group = attention.heads // attention.kv_heads
    keep_heads(model, attention, list(range(per_group, 2 * per_group)))
    keep_width(model, _unit(units, "layers.1.ffn"), list(range(0, 64, 2)))
    skip(model, _unit(units, "layers.0.ffn"))
    assert _difference(exported, model, skeleton, task, tmp_path) < 1e-4
    with torch.no_grad():
        inputs = task.example_inputs(2, 12)
        assert (model(**inputs).logits - dense(**inputs).logits).abs().max() > 1e-2


@pytest.mark.parametrize("layout", ["bert", "llama"])
def test_skipped_units_leave_no_node(exported, layout):
    dense, units, _, skeleton = exported(layout)
    model = copy.deepcopy(dense)
    for unit in units:
        if unit.skippable:
            skip(model, unit)
    lowered = target().lower(skeleton, model, units)
    assert not [node for node in lowered.graph.node if node.op_type == "Attention"]
    names = {tensor.name for tensor in lowered.graph.initializer}
    gone = {site.name for unit in units if unit.skippable for site in unit.sites}
    assert not [name for name in names if name.rpartition(".")[0] in gone]


@pytest.mark.parametrize("layout", ["bert", "dinov2"])
def test_everything_skipped_equals_torch(exported, layout, tmp_path):
    dense, units, task, skeleton = exported(layout)
    model = copy.deepcopy(dense)
    for unit in units:
        if unit.skippable:
            skip(model, unit)
    assert _difference(exported, model, skeleton, task, tmp_path) < 1e-4


def test_parameters_outside_the_sites_are_refreshed(exported, tmp_path):
    dense, _, task, skeleton = exported("dinov2")
    model = copy.deepcopy(dense)
    sites = {attribute(n, "site") for n in skeleton.graph.node if attribute(n, "site")}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[0] not in sites:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    assert _difference(exported, model, skeleton, task, tmp_path) < 1e-4


@pytest.mark.parametrize(
    ("layout", "steps", "tolerance"),
    [
        ("bert", (), 1e-4),
        ("llama", (), 1e-4),
        ("bert", (Step.of("gptq", weights=4, activations=32, group=16),), 2e-3),
        ("vit", (Step.of("rtn", weights=8, activations=8, group=0),), 2e-2),
    ],
)
def test_sparse_equals_torch_in_fewer_bytes(exported, layout, steps, tolerance, tmp_path):
    dense, units, task, skeleton = exported(layout)
    sizes = {}
    for sparse in (True, False):
        model = copy.deepcopy(dense)
        for unit in units:
            if unit.kind not in ("attention", "ffn"):
                continue
            option = Option(((Step.of("magnitude", level=0.75),) if sparse else ()) + steps)
            state = apply_option(unit, _dense_state(model, unit), option, _plain_stats(unit))
            install(model, unit, state)
            sites = [model_weights(model)(site.name) for site in unit.sites]
            stored = [None if site.mask is None else int(site.mask.sum()) for site in sites]
            assert stored == [form.nonzeros for form in option_formats(unit, option).values()]
        runtime = target()
        artifact = runtime.write(runtime.lower(skeleton, model.eval(), []), tmp_path)
        sizes[sparse] = artifact.size_bytes
        inputs = {k: v.numpy() for k, v in task.example_inputs(2, 12).items()}
        with torch.no_grad():
            spread = float(model(**task.example_inputs(2, 12)).logits.std())
        assert runtime.verify(artifact, model, inputs) < tolerance * max(spread, 1.0)
    if not steps:  # of matrices this small the nodes are as large as what they save otherwise
        assert sizes[True] < 0.8 * sizes[False]


def _dense_state(model, unit):
    return {
        site.name: SiteState(
            weight=model.get_submodule(site.name).weight.detach(),
            bias=model.get_submodule(site.name).bias.detach() if site.bias else None,
            format=dense_format(unit)[site.name],
        )
        for site in unit.sites
    }


def _plain_stats(unit):
    return {
        site.name: SiteStats(torch.eye(site.columns) * 100, torch.zeros(site.columns), 100)
        for site in unit.sites
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("bits", "group", "activations", "tolerance"),
    [(8, None, 32, 1e-4), (4, 16, 32, 2e-3), (8, None, 8, 2e-2), (4, 16, 8, 2e-1)],
)
def test_quantised_equals_torch(exported, layout, bits, group, activations, tolerance, tmp_path):
    """8-bit activations can fall on the other side of a rounding step: a looser tolerance; 4-bit
    weights are widened to 8 bits by the runtime, which rounds them once more."""
    dense, units, task, skeleton = exported(layout)
    model = copy.deepcopy(dense)
    for unit in units:
        if unit.kind in ("attention", "ffn", "embedding"):
            quantise_unit(model, unit, bits, group, activations)
    with torch.no_grad():
        spread = float(dense(**task.example_inputs(2, 12)).logits.std())
    shapes = ((1, 12),) if activations == 8 else ((1, 12), (4, 9))
    assert _difference(exported, model, skeleton, task, tmp_path, shapes) < tolerance * max(
        1.0, spread
    )


def test_export_leaves_the_model_alone(exported):
    model, *_ = exported("bert")
    assert model.config._attn_implementation == "sdpa"
    assert isinstance(model.get_submodule("classifier"), torch.nn.Linear)


def test_a_tied_table_is_stored_once(exported):
    model, _, _, skeleton = exported("llama")
    lowered = target().lower(skeleton, model, [])
    sizes = [t for t in lowered.graph.initializer if list(t.dims) in ([50, 32], [32, 50])]
    assert [t.name for t in sizes] == ["model.embed_tokens.weight"]


def test_part_of_a_sublayer_cannot_be_skipped(exported):
    model, _, _, skeleton = exported("bert")
    provide = model_weights(model)
    site = "bert.encoder.layer.0.intermediate.dense"
    with pytest.raises(InternalError, match=r"site .* is skipped"):
        target().lower_weights(skeleton, lambda s: None if s == site else provide(s))


def test_heads_that_do_not_divide_are_refused(exported):
    model, _, _, skeleton = exported("bert")
    provide = model_weights(model)
    site = "bert.encoder.layer.0.attention.self.query"

    def odd(name: str) -> SiteWeights | None:
        if name != site:
            return provide(name)
        return SiteWeights(SiteFormat(30, 32, False), weight=np.zeros((30, 32), np.float32))

    with pytest.raises(InternalError, match="no whole number of 8-wide heads"):
        target().lower_weights(skeleton, odd)


def test_a_parameter_of_another_shape_is_refused(exported):
    model, _, _, skeleton = exported("bert")
    parameters = dict(model_parameters(model))
    parameters["bert.embeddings.LayerNorm.weight"] = np.zeros(3, np.float32)
    with pytest.raises(InternalError, match="has shape"):
        target().lower_weights(skeleton, model_weights(model), parameters)


def test_skeletons_are_cached_by_content(exported, tmp_path: Path, monkeypatch):
    model, units, task, skeleton = exported("bert")
    calls = []

    def fake(*_, **__):
        calls.append(1)
        return skeleton

    monkeypatch.setattr("autocomp.targets.skeleton_store.export_skeleton", fake)
    first = cached_skeleton(model, units, task, tmp_path)
    again = cached_skeleton(copy.deepcopy(model), units, task, tmp_path)
    assert len(calls) == 1
    assert first == again == skeleton
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"damaged")
    assert isinstance(cached_skeleton(model, units, task, tmp_path), onnx.ModelProto)
    assert len(calls) == 2
