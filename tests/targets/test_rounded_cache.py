"""Graphs with a key-value cache of int8, against torch that rounds keys and values instead."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from target_examples import TextTask, small_model

from autocomp.calibrate.stats import SiteStats
from autocomp.core.candidate import Option, Step
from autocomp.core.unit import SiteFormat, dense_format
from autocomp.library.student import unit_state
from autocomp.models.cached import rounded
from autocomp.models.surgery import copy_for_surgery, install
from autocomp.operators import apply_option
from autocomp.spec.schema import TargetSection, WorkloadSection
from autocomp.targets import make_target
from autocomp.targets.generation import PAST, PRESENT, feeds, generate
from autocomp.targets.onnxruntime_cpu import OnnxRuntimeTarget, open_session
from autocomp.targets.profile import profile

TASK = TextTask(masked=False)
CACHE = Step.of("kv_cache", bits=8)
OPTIONS = {
    "alone": Option((CACHE,)),
    "half the heads, 8 bits": Option(
        (
            Step.of("heads", keep=2),
            Step.of("gptq", weights=8, activations=32, group=0),
            CACHE,
        )
    ),
    "low rank": Option((Step.of("rank", ratio=0.9), CACHE)),
}


def target() -> OnnxRuntimeTarget:
    return OnnxRuntimeTarget(WorkloadSection(prompt=9, generate=12))


def statistics(model: Any, units: Any) -> dict[str, SiteStats]:
    """Of what every layer reads in a few random sequences."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda module, args, name=site.name: seen.update({name: args[0].flatten(0, 1)})
        )
        for unit in units
        if unit.kind != "embedding"
        for site in unit.sites
    ]
    with torch.no_grad():
        model(input_ids=TASK.example_inputs(8, 24)["input_ids"])
    for handle in handles:
        handle.remove()
    return {
        name: SiteStats(x.t() @ x, x.mean(dim=0), len(x), sample=x, low=x.amin(0), high=x.amax(0))
        for name, x in seen.items()
    }


def compressed(dense: Any, units: Any, option: Option) -> Any:
    """A copy of `dense` with `option` at every attention."""
    stats, model = statistics(dense, units), copy_for_surgery(dense)
    for unit in units:
        if unit.kind == "attention":
            install(model, unit, apply_option(unit, unit_state(dense, unit), option, stats))
    return model


@pytest.fixture(scope="session")
def llama() -> tuple[Any, Any, Any]:
    model, units, _ = small_model("llama", tie_word_embeddings=False)
    model.config.use_cache = False
    return model, units, target().export(model, units, TASK)


def in_pieces(session: Any, ids: np.ndarray, cuts: list[int]) -> np.ndarray:
    past = {k: v for k, v in feeds(session, {"input_ids": ids}).items() if k.startswith(PAST)}
    names = ["logits", *(PRESENT + name.removeprefix(PAST) for name in past)]
    parts = []
    for piece in np.split(ids, cuts, axis=1):
        logits, *present = session.run(names, {"input_ids": piece, **past})
        past = dict(zip(past, present, strict=True))
        assert {value.dtype for value in present} == {np.dtype(np.int8)}
        parts.append(logits)
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_equals_torch_that_rounds(llama, option, runtime, tmp_path):
    pytest.importorskip(runtime)
    dense, units, skeleton = llama
    model = compressed(dense, units, option)
    workload = WorkloadSection(prompt=9, generate=12)
    target: Any = make_target(TargetSection(runtime=runtime, workload=workload))
    artifact = target.write(target.lower(skeleton, model, units), tmp_path)
    ids = TASK.example_inputs(3, 14)["input_ids"]
    assert target.verify(artifact, model, {"input_ids": ids.numpy()}) < 1e-3
    session = target.open(artifact.path)
    with torch.no_grad():
        whole = model(input_ids=ids[:1]).logits.numpy()
        unrounded = compressed(dense, units, Option(option.steps[:-1]))(input_ids=ids[:1]).logits
        expected = model.generate(
            ids[:, :9], max_new_tokens=12, do_sample=False, use_cache=False, eos_token_id=None
        )[:, 9:]
    found = in_pieces(session, ids[:1].numpy(), [5, 6, 7, 10])
    assert np.abs(found - whole).max() < 1e-3 < np.abs(unrounded.numpy() - whole).max()
    new = generate(session, {"input_ids": ids[:, :9].numpy()}, 12)
    np.testing.assert_array_equal(new, expected.numpy())


def test_a_model_that_looks_positions_up():
    """GPT-2: keys have a bias and are not rotated."""
    dense, units, _ = small_model("gpt2")
    dense.config.use_cache = False
    model = compressed(dense, units, OPTIONS["alone"])
    lowered = target().lower(target().export(dense, units, TASK), model, units)
    ids = TASK.example_inputs(1, 14)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits.numpy()
    session = open_session(lowered.SerializeToString(), 1)
    assert np.abs(in_pieces(session, ids.numpy(), [8, 9, 12]) - whole).max() < 1e-3


def test_the_cache_is_a_quarter(llama):
    dense, units, skeleton = llama
    bytes_of = []
    for option in (Option(), OPTIONS["alone"]):
        lowered = target().lower(skeleton, compressed(dense, units, option), units)
        session = open_session(lowered.SerializeToString(), 1)
        made = feeds(session, {"input_ids": np.zeros((1, 1), np.int64)}, 1, 40)
        bytes_of.append(sum(v.nbytes for name, v in made.items() if name.startswith(PAST)))
    assert bytes_of == [4 * 2 * 2 * 40 * 16, 2 * 2 * 40 * 16]


def test_a_float_cache_may_stand_beside(llama):
    """One layer's cache is rounded, the other's is not."""
    dense, units, skeleton = llama
    model = compressed(dense, [u for u in units if u.layer == 1], OPTIONS["alone"])
    session = open_session(target().lower(skeleton, model, units).SerializeToString(), 1)
    types = {value.name: value.type for value in session.get_inputs()[1:]}
    assert types["past_key_values.0.key"] == types["past_key_values.0.value"] == "tensor(float)"
    assert types["past_key_values.1.key"] == types["past_key_values.1.value"] == "tensor(int8)"
    ids = TASK.example_inputs(2, 10)["input_ids"]
    with torch.no_grad():
        expected = model.generate(
            ids, max_new_tokens=4, do_sample=False, use_cache=False, eos_token_id=None
        )[:, 10:]
    np.testing.assert_array_equal(generate(session, {"input_ids": ids.numpy()}, 4), expected)


def test_rounding_is_to_the_nearest_step_and_clips():
    scale = torch.tensor([0.5, 2.0])
    x = torch.tensor([[0.3, -3.1], [0.1, 900.0], [-70.0, -900.0]], requires_grad=True)
    y = rounded(x, scale)
    assert y.tolist() == [[0.5, -4.0], [0.0, 254.0], [-64.0, -256.0]]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]


def test_trained_and_copied_it_stays_rounded(llama):
    dense, units, _ = llama
    model = copy.deepcopy(compressed(dense, units, OPTIONS["alone"]))
    before = set(dense.state_dict())
    assert set(model.state_dict()) == before  # scales are fixed: nothing is added
    attention = next(unit for unit in units if unit.kind == "attention")
    state = unit_state(model, attention)
    kept = {name for name, site in state.items() if site.output_scale is not None}
    assert kept == {s.name for s in attention.sites if s.role in ("key", "value")}
    assert {state[name].format.cache_bits for name in kept} == {8}


def test_only_where_tokens_are_generated():
    form = SiteFormat(16, 16, False, cache_bits=8)
    assert target().formats_supported(form) is None
    whole = OnnxRuntimeTarget(WorkloadSection(sequence=32))
    assert "generates no tokens" in str(whole.formats_supported(form))
    fewer = SiteFormat(16, 16, False, cache_bits=4)
    assert "available: dense, 8" in str(target().formats_supported(fewer))


def test_a_table_of_costs_times_it(llama):
    _, units, skeleton = llama
    formats = {unit.name: {"dense": dense_format(unit)} for unit in units}
    from autocomp.operators import option_formats

    for unit in units:
        if unit.kind == "attention":
            formats[unit.name]["rounded"] = option_formats(unit, OPTIONS["alone"])
    inputs = {k: v.numpy() for k, v in TASK.example_inputs(1, 9).items()}
    table = profile(target(), skeleton, units, formats, inputs, candidates=2)
    entries = table.entries["layers.0.attention"]
    assert entries["rounded"].latency_ms != entries["dense"].latency_ms
    assert 0 < entries["rounded"].size_bytes - entries["dense"].size_bytes < 2000
