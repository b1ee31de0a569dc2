"""Sharing keys and values: what pooling gives, what training reaches, and what is left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_examples import EXAMPLES, logits
from recorded_contract import RecordedContract
from replaced_examples import Case, case

from autocomp.calibrate.record import Call, load_recording
from autocomp.core.candidate import Option, Step
from autocomp.core.errors import InternalError, UserError
from autocomp.core.unit import Unit
from autocomp.library.student import unit_state
from autocomp.models.surgery import copy_for_surgery, install
from autocomp.operators import OPERATORS, apply_step, option_formats, unit_options
from autocomp.operators.protocol import Operator, Rule, UnitState
from autocomp.operators.prune.groups import pool
from autocomp.operators.replace import distil as distil_module
from autocomp.operators.replace.distil import Settings
from autocomp.operators.replace.sublayer import Sublayer
from autocomp.testing.operator_contract import assert_same

SHORT = Settings(steps=40, warm_up=5, trial_steps=5, check_every=10)
ONE = Step.of("groups", keep=1)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil_module, "SETTINGS", SHORT)


@pytest.fixture(scope="module", params=["bert", "llama"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=list(EXAMPLES))
def any_made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(request.param, tmp_path_factory.mktemp(request.param))


_grouped: dict[int, UnitState] = {}


def grouped(one: Case) -> UnitState:
    """Trained once for all tests."""
    if id(one) not in _grouped:
        _grouped[id(one)] = apply_step(one.unit, one.state, ONE, one.stats)
    return _grouped[id(one)]


def name_of(one: Case, role: Any) -> str:
    site = one.unit.site(role)
    assert site is not None
    return site.name


def alike(one: Case, scales: tuple[float, ...] = ()) -> UnitState:
    """The unit with all its key-value heads equal to the first, keys times `scales`."""
    assert one.unit.head_dim is not None
    assert one.unit.kv_heads is not None
    state = dict(one.state)
    for role in ("key", "value"):
        site = state[name_of(one, role)]
        factors = torch.ones(one.unit.kv_heads)
        if role == "key" and scales:
            factors = torch.tensor(scales)
        factors = factors.repeat_interleave(one.unit.head_dim)
        times = one.unit.kv_heads
        weight = site.weight[: one.unit.head_dim].repeat(times, 1) * factors[:, None]
        bias = site.bias
        if bias is not None:
            bias = bias[: one.unit.head_dim].repeat(times) * factors
        state[name_of(one, role)] = replace(site, weight=weight, bias=bias)
    return state


def test_heads_that_are_alike_are_pooled_without_loss(any_made: Case) -> None:
    """In every layout: the whole model's output is what it was, and nothing was trained."""
    state = alike(any_made)
    model = copy_for_surgery(any_made.model)
    install(model, any_made.unit, state)
    pooled = apply_step(any_made.unit, state, ONE, any_made.stats)
    key = any_made.unit.site("key")
    assert key is not None
    assert pooled[key.name].format.rows == any_made.unit.head_dim
    training = pooled[name_of(any_made, "output")].training
    assert training is not None
    assert training.report["ended"] == "exact"
    fewer = copy_for_surgery(any_made.model)
    install(fewer, any_made.unit, pooled)
    for batch in any_made.batches:
        expected = logits(model, batch)
        scale = float(expected.abs().max())
        torch.testing.assert_close(logits(fewer, batch), expected, rtol=0, atol=1e-5 * scale)
        assert float((logits(any_made.model, batch) - expected).abs().max()) > 1e-2 * scale


def test_normed_keys_of_other_lengths_are_pooled_without_loss(tmp_path: Path) -> None:
    """The norm makes heads of one direction equal, so their lengths must not weigh."""
    one = case("qwen3", tmp_path)
    assert not one.unit.plain_keys
    state = alike(one, scales=(1.0, 4.0, 0.5))
    model, fewer = copy_for_surgery(one.model), copy_for_surgery(one.model)
    install(model, one.unit, state)
    install(fewer, one.unit, apply_step(one.unit, state, ONE, one.stats))
    expected = logits(model, one.batches[0])
    torch.testing.assert_close(logits(fewer, one.batches[0]), expected, rtol=0, atol=1e-3)
    uneven = pool(one.unit, one.state, 1, one.stats)[name_of(one, "key")][0]
    plain = pool(replace(one.unit, plain_keys=True), one.state, 1, {})[name_of(one, "key")][0]
    assert not torch.allclose(uneven, plain, rtol=1e-3)


def test_the_means_are_those_of_neighbours(made: Case) -> None:
    unit = replace(made.unit, kv_heads=4, head_dim=6)
    weight = torch.randn(24, 24)
    key, value = name_of(made, "key"), name_of(made, "value")
    bias = torch.randn(24)
    state = dict(made.state)
    state[key] = replace(state[key], weight=weight, bias=None)
    state[value] = replace(state[value], weight=weight.flip(0), bias=bias)
    pooled = pool(unit, state, 2, {})
    expected = torch.cat([(weight[:6] + weight[6:12]) / 2, (weight[12:18] + weight[18:]) / 2])
    torch.testing.assert_close(pooled[key][0], expected)
    assert pooled[key][1] is None
    torch.testing.assert_close(
        pooled[value][1], torch.cat([(bias[:6] + bias[6:12]) / 2, (bias[12:18] + bias[18:]) / 2])
    )


def by_hand(one: Case, state: UnitState, call: Call) -> torch.Tensor:
    """Grouped attention written out in float64, for the first sequence of a call."""
    hidden = call.hidden[0].double()
    tokens, width = hidden.shape[0], one.unit.head_dim
    assert width is not None

    def layer(role: str, x: torch.Tensor) -> torch.Tensor:
        site = state[name_of(one, role)]
        y = x @ site.weight.double().t()
        return y if site.bias is None else y + site.bias.double()

    def rotated(x: torch.Tensor) -> torch.Tensor:
        positions = call.kwargs.get("position_embeddings")
        if positions is None:
            return x
        cos, sin = (part[0].double() for part in positions)
        turned = torch.cat([-x[:, width // 2 :], x[:, : width // 2]], dim=1)
        return x * cos + turned * sin

    queries, keys, values = (layer(role, hidden) for role in ("query", "key", "value"))
    heads, groups = queries.shape[1] // width, keys.shape[1] // width
    real = torch.ones(tokens, dtype=torch.bool) if call.real is None else call.real[0]
    outputs = []
    for head in range(heads):
        group = head // (heads // groups)
        query = rotated(queries[:, head * width : (head + 1) * width])
        key = rotated(keys[:, group * width : (group + 1) * width])
        scores = query @ key.t() / width**0.5
        seen = real[None, :].expand(tokens, tokens)
        if one.unit.causal:
            seen = seen & torch.ones(tokens, tokens, dtype=torch.bool).tril()
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(weights @ values[:, group * width : (group + 1) * width])
    return layer("output", torch.cat(outputs, dim=1))[real]


def test_the_installed_unit_is_grouped_attention_written_out(made: Case) -> None:
    """Two groups where there are more, in float64, rotary positions included."""
    keep = 2 if made.unit.kv_heads == 4 else 1
    pooled = pool(made.unit, made.state, keep, made.stats)
    recording = load_recording(made.stats.recording)
    student = Sublayer(recording, made.unit, made.state)
    student.share(pooled)
    state = dict(made.state)
    for name, (weight, bias) in pooled.items():
        form = replace(state[name].format, rows=len(weight))
        state[name] = replace(state[name], weight=weight, bias=bias, format=form)
    installed = Sublayer(recording, made.unit, made.state)
    install(installed.model, made.unit, state)
    call = recording.calls[0]
    expected = by_hand(made, state, call)
    real = slice(0, len(expected))
    for sublayer in (student, installed):
        with torch.no_grad():
            found = sublayer.run(call)[0, real].double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        dense = Sublayer(recording, made.unit, made.state).run(call)[0, real].double()
    torch.testing.assert_close(dense, by_hand(made, made.state, call), rtol=1e-5, atol=1e-5)
    assert (dense - expected).abs().max() > 1e-2


def test_training_lowers_the_error_of_pooling(made: Case) -> None:
    """As told, and as found independently: on all sequences, against the dense sublayer."""
    state = grouped(made)
    output = name_of(made, "output")
    training = state[output].training
    assert training is not None
    report = training.report
    assert report["error"] < 0.6 * report["error_before"]
    assert report["tokens"] > 4 * report["held_out_tokens"] > 0
    recording = load_recording(made.stats.recording)
    teacher, student = (Sublayer(recording, made.unit, made.state) for _ in range(2))
    untrained = Sublayer(recording, made.unit, made.state)
    untrained.share(pool(made.unit, made.state, 1, made.stats))
    install(student.model, made.unit, state)
    errors = [0.0, 0.0]
    for call in recording.calls:
        real = torch.ones(call.hidden.shape[:2]) if call.real is None else call.real
        with torch.no_grad():
            y = teacher.run(call)
            for index, other in enumerate((student, untrained)):
                errors[index] += float((y - other.run(call))[real.bool()].square().sum())
    assert errors[0] < 0.6 * errors[1]


def test_later_steps_are_solved_on_the_new_inputs_of_the_output(made: Case) -> None:
    bits = Step.of("gptq", weights=4, activations=32, group=16)
    prefix, name = grouped(made), name_of(made, "output")
    training = prefix[name].training
    assert training is not None
    assert training.stats is not None
    both = apply_step(made.unit, prefix, bits, dict(made.stats))
    assert both[name].training is training
    own = OPERATORS.get("gptq").apply(made.unit, prefix, bits, {**made.stats, name: training.stats})
    assert_same(both, own, "groups, then bits")
    unaware = OPERATORS.get("gptq").apply(made.unit, prefix, bits, dict(made.stats))
    assert not torch.equal(unaware[name].weight, both[name].weight)
    formats = option_formats(made.unit, Option((ONE, bits)))
    assert formats == {site: state.format for site, state in both.items()}


def test_installed_again_the_unit_is_as_before(made: Case) -> None:
    """Dense, shared and dense again: how many heads share is what is installed."""
    model = copy_for_surgery(made.model)
    expected = logits(model, made.batches[0])
    install(model, made.unit, grouped(made))
    read = unit_state(model, made.unit)
    assert_same({n: replace(s, training=None) for n, s in grouped(made).items()}, read, "read")
    assert not torch.equal(logits(model, made.batches[0]), expected)
    install(model, made.unit, made.state)
    assert torch.equal(logits(model, made.batches[0]), expected)
    assert torch.equal(logits(made.model, made.batches[0]), expected)


def units(name: str = "bert") -> dict[str, Unit]:
    return {unit.name: unit for unit in EXAMPLES[name].units()}


def test_fractions_become_divisors() -> None:
    unit = replace(units()["layers.0.attention"], heads=12, kv_heads=12)
    operator = OPERATORS.get("groups")

    def kept(*fractions: float) -> list[int | None]:
        steps = operator.options(unit, Rule({"groups": list(fractions)}))
        return [None if step is None else step["keep"] for step in steps]

    assert kept(1.0, 0.5, 0.33, 0.25, 0.01) == [None, 6, 4, 3, 1]
    assert kept(0.75, 0.9, 0.5, 0.45) == [6, None]  # 9 is as near to 6 as to 12; the smaller
    alone = replace(unit, heads=4, kv_heads=1)
    assert operator.options(alone, Rule({"groups": [0.5, 1.0]})) == [None]


def test_options_are_alternatives_of_structure_and_take_bits() -> None:
    rule = Rule(
        {"heads": [1.0, 0.5], "groups": [0.5, 0.25]}, {"method": "gptq", "weights": ["dense", 8]}
    )
    unit = units()["layers.0.attention"]
    bits = "gptq activations=32 group=0 weights=8"
    starts = ("heads keep=2", "groups keep=2", "groups keep=1")
    expected = ["dense", bits, *(text for s in starts for text in (s, f"{s} + {bits}"))]
    assert [option.label() for option in unit_options(unit, rule)] == expected
    formats = option_formats(unit, Option((Step.of("groups", keep=1),)))
    rows = {site.role: formats[site.name].rows for site in unit.sites}
    assert rows == {"query": 24, "key": 6, "value": 6, "output": 24}
    weights = sum(form.rows * form.columns for form in formats.values())
    assert weights == 24 * 24 * 2 + 6 * 24 * 2


def test_refuses_what_cannot_be() -> None:
    operator, known = OPERATORS.get("groups"), units()
    assert operator.options(known["layers.0.ffn"], Rule({})) == []
    with pytest.raises(UserError, match=r"kind ffn .*Match layers\.\*\.attention"):
        operator.options(known["layers.0.ffn"], Rule({"groups": [0.5]}))
    with pytest.raises(UserError, match=r"groups at .* no list of fractions"):
        operator.options(known["layers.0.attention"], Rule({"groups": 0.5}))


def test_without_a_recording_nothing_is_trained(made: Case) -> None:
    with pytest.raises(InternalError, match="not recorded"):
        apply_step(made.unit, made.state, ONE, dict(made.stats))


class TestContract(RecordedContract):
    steps = (ONE,)

    @pytest.fixture
    def operator(self) -> Operator:
        return OPERATORS.get("groups")

    def rules(self) -> list[Rule]:
        return [Rule({"groups": [0.5, 0.1]})]
