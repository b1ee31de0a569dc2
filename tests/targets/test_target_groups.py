"""Candidates whose attention shares keys and values, on both runtimes, against torch."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from target_examples import ImageTask, TextTask, small_model
from torch import nn

from autocomp.core.candidate import Option, Step
from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import Unit, dense_format
from autocomp.library.student import unit_state
from autocomp.models.surgery import install
from autocomp.models.tokens import install_tokens
from autocomp.operators import option_formats
from autocomp.operators.prune.groups import pool
from autocomp.spec.schema import TargetSection, WorkloadSection
from autocomp.targets import make_target
from autocomp.targets.generation import carried, feeds, generate
from autocomp.targets.graph import attribute
from autocomp.targets.profile import profile

RUNTIMES = ("onnxruntime", "openvino")


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return str(request.param)


def target(runtime: str, **workload: Any) -> Any:
    section = TargetSection(runtime=runtime, workload=WorkloadSection(**workload))
    return make_target(section)


def share(model: nn.Module, unit: Unit, keep: int) -> None:
    """Pool a unit of a model, untrained. Random heads: what is not shared right is far off."""
    state = unit_state(model, unit)
    for name, (weight, bias) in pool(replace(unit, plain_keys=True), state, keep, {}).items():
        form = replace(state[name].format, rows=len(weight))
        state[name] = replace(state[name], weight=weight, bias=bias, format=form)
    install(model, unit, state)


def attention(units: list[Unit]) -> list[Unit]:
    return [unit for unit in units if unit.kind == "attention"]


@pytest.mark.parametrize("layout", ["bert", "vit", "llama", "qwen3", "gpt2"])
def test_lowered_equals_torch(exported: Any, layout: str, runtime: str, tmp_path: Path) -> None:
    """One head of keys and values in one layer, half of them in the next."""
    dense, units, task, skeleton = exported(layout)
    model = copy.deepcopy(dense)
    one, other = attention(units)
    assert other.kv_heads is not None
    share(model, one, 1)
    if other.kv_heads > 2:
        share(model, other, 2)
    place = target(runtime, sequence=12)
    lowered = place.lower(skeleton, model, units)
    artifact = place.write(lowered, tmp_path)
    spread = float(model(**task.example_inputs(1, 12)).logits.detach().std())
    for shape in ((1, 12), (4, 9)):
        inputs = {name: value.numpy() for name, value in task.example_inputs(*shape).items()}
        assert place.verify(artifact, model, inputs) < 1e-4 * max(spread, 1.0)
        with torch.no_grad():
            arguments = task.example_inputs(*shape)
            moved = (model(**arguments).logits - dense(**arguments).logits).abs().max()
        assert float(moved) > 1e-2 * spread


def test_the_operator_is_told_how_many_heads(exported: Any) -> None:
    dense, units, _, skeleton = exported("bert")
    model = copy.deepcopy(dense)
    share(model, attention(units)[0], 2)
    lowered = target("onnxruntime", sequence=12).lower(skeleton, model, units)
    nodes = [node for node in lowered.graph.node if node.op_type == "Attention"]
    found = [(attribute(n, "q_num_heads"), attribute(n, "kv_num_heads")) for n in nodes]
    assert found == [(4, 2), (4, 4)]


def test_token_by_token_is_the_whole(runtime: str, tmp_path: Path) -> None:
    """With a cache of as many heads as are left."""
    model, units, _ = small_model("llama", tie_word_embeddings=False)
    model.config.use_cache = False
    task = TextTask(masked=False)
    place = target(runtime, prompt=9, generate=12)
    skeleton = place.export(model, units, task)
    share(model, attention(units)[0], 1)
    lowered = place.lower(skeleton, model, units)
    caches = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim][1]
        for value in lowered.graph.input
        if value.name.startswith("past_key_values")
    }
    assert set(caches.values()) == {1, 2}
    assert caches["past_key_values.0.key"] == caches["past_key_values.0.value"] == 1
    artifact = place.write(lowered, tmp_path)
    ids = task.example_inputs(3, 14)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits.numpy()
        expected = model.generate(
            ids[:, :9], max_new_tokens=12, do_sample=False, use_cache=False, eos_token_id=None
        )[:, 9:].numpy()
    session = place.open(artifact.path)
    first = feeds(session, {"input_ids": ids.numpy()})
    pasts = carried(first)
    past = {name: first[name] for name in pasts}
    names = ["logits", *pasts.values()]
    parts = []
    for piece in np.split(ids.numpy(), [5, 6, 7, 10], axis=1):
        logits, *present = session.run(names, {"input_ids": piece, **past})
        past = dict(zip(past, present, strict=True))
        parts.append(logits)
    assert np.abs(np.concatenate(parts, axis=1) - whole).max() < 1e-4
    assert past["past_key_values.0.key"].shape[1] == 1
    new = generate(session, {"input_ids": ids[:, :9].numpy()}, 12)
    np.testing.assert_array_equal(new, expected)


def test_a_cache_of_int8_has_the_channels_that_are_left(runtime: str, tmp_path: Path) -> None:
    model, units, _ = small_model("llama", tie_word_embeddings=False)
    model.config.use_cache = False
    task = TextTask(masked=False)
    place = target(runtime, prompt=9, generate=12)
    skeleton = place.export(model, units, task)
    ids = task.example_inputs(2, 9)["input_ids"]
    unit = attention(units)[1]
    share(model, unit, 1)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    state = unit_state(model, unit)
    for site in unit.sites:
        if site.role in ("key", "value"):
            form = replace(state[site.name].format, cache_bits=8)
            scale = torch.linspace(0.05, 0.1, form.rows)
            state[site.name] = replace(state[site.name], format=form, output_scale=scale)
    install(model, unit, state)
    artifact = place.write(place.lower(skeleton, model, units), tmp_path)
    assert place.verify(artifact, model, {"input_ids": ids.numpy()}) < 1e-3
    with torch.no_grad():
        assert (model(input_ids=ids).logits - before).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["tome", "token_prune", "token_fuse"])
def test_tokens_are_chosen_by_all_query_heads(method: str, runtime: str, tmp_path: Path) -> None:
    dense, units, _ = small_model("vit", image_size=48, num_hidden_layers=3)
    task = ImageTask(48)
    place = target(runtime, sequence=12)
    skeleton = place.export(dense, units, task)
    model = copy.deepcopy(dense)
    share(model, attention(units)[0], 2)
    share(model, attention(units)[1], 1)
    reduction = TokenReduction(method, 0.25, protected=1)
    install_tokens(model, units, {f"layers.{k}.attention": reduction for k in (0, 1)})
    artifact = place.write(place.lower(skeleton, model, units), tmp_path)
    inputs = {name: value.numpy() for name, value in task.example_inputs(3, 0).items()}
    assert place.verify(artifact, model, inputs) < 1e-4


def test_sizes_are_those_of_fewer_rows(exported: Any, tmp_path: Path) -> None:
    """What `check` says of a grouped unit is what the file loses."""
    dense, units, _, skeleton = exported("bert")
    unit = attention(units)[0]
    place = target("onnxruntime", sequence=12)
    formats = option_formats(unit, Option((Step.of("groups", keep=1),)))
    grouped, whole = (
        sum(place.size_bytes(form) for form in form_of.values())
        for form_of in (formats, dense_format(unit))
    )
    assert whole - grouped == 4 * 2 * 3 * 8 * (32 + 1)  # keys and values of three heads of 8
    model = copy.deepcopy(dense)
    share(model, unit, 1)
    sizes = []
    for number, one in enumerate((dense, model)):
        written = place.write(place.lower(skeleton, one, units), tmp_path / str(number))
        sizes.append(written.size_bytes)
    assert sizes[0] - sizes[1] == pytest.approx(whole - grouped, abs=300)


def test_profiled_by_their_formats(exported: Any, runtime: str) -> None:
    _, units, task, skeleton = exported("bert")
    option = Option((Step.of("groups", keep=1),))
    options = {unit.name: {"dense": dense_format(unit)} for unit in units}
    for unit in attention(units):
        options[unit.name]["groups"] = option_formats(unit, option)
    inputs = {name: value.numpy() for name, value in task.example_inputs(1, 12).items()}
    table = profile(target(runtime, sequence=12), skeleton, units, options, inputs, candidates=2)
    for unit in attention(units):
        entries = table.entries[unit.name]
        assert entries["groups"].latency_ms > 0
        assert entries["groups"].size_bytes < entries["dense"].size_bytes
