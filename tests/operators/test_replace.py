"""Replacing attention: what is recorded, what training reaches, and what is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_examples import EXAMPLES
from recorded_contract import RecordedContract
from replaced_examples import Case, Distances, case, register

from autocomp.calibrate.accumulate import Accumulator
from autocomp.calibrate.record import load_recording
from autocomp.core.candidate import Option, Step
from autocomp.core.errors import InternalError, UserError
from autocomp.core.unit import Unit
from autocomp.models.surgery import copy_for_surgery, install
from autocomp.operators import OPERATORS, apply_step, option_formats, unit_options
from autocomp.operators.protocol import Operator, Rule, UnitState
from autocomp.operators.replace import distil as distil_module
from autocomp.operators.replace.distil import Settings, distil
from autocomp.operators.replace.sublayer import Sublayer
from autocomp.testing.operator_contract import assert_same

SHORT = Settings(steps=40, warm_up=5, trial_steps=5, check_every=10)
ELU, DISTANCES = Step.of("replace", mixer="elu"), Step.of("replace", mixer="distances")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil_module, "SETTINGS", SHORT)


@pytest.fixture(scope="module", params=["bert", "llama"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=list(EXAMPLES))
def any_made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(request.param, tmp_path_factory.mktemp(request.param))


_replaced: dict[tuple[int, Step], UnitState] = {}


def replaced(one: Case, step: Step) -> UnitState:
    """Trained once for all tests."""
    key = id(one), step
    if key not in _replaced:
        _replaced[key] = apply_step(one.unit, one.state, step, one.stats)
    return _replaced[key]


def attention_output(one: Case) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(What the whole model's output projection gives, real tokens) per batch."""
    name = next(site.name for site in one.unit.sites if site.role == "output")
    seen: list[torch.Tensor] = []
    handle = one.model.get_submodule(name).register_forward_hook(lambda m, a, y: seen.append(y))
    for batch in one.batches:
        with torch.no_grad():
            one.model(**batch)
        mask = batch.get("attention_mask")
        y = seen.pop()
        yield y, torch.ones(y.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    handle.remove()


def test_a_recorded_sublayer_gives_what_it_gives_in_the_model(any_made: Case) -> None:
    """Without the rest of the model: rotary positions, norms and masks included."""
    recording = load_recording(any_made.stats.recording)
    sublayer = Sublayer(recording, any_made.unit, any_made.state)
    pairs = zip(recording.calls, attention_output(any_made), strict=True)
    for call, (expected, real) in pairs:
        with torch.no_grad():
            found = sublayer.run(call)
            some = sublayer.run(call.rows(torch.tensor([5, 2])))
        scale = float(expected[real].abs().max())
        torch.testing.assert_close(found[real], expected[real], rtol=0, atol=3e-3 * scale)
        kept = real[[5, 2]]
        torch.testing.assert_close(some[kept], found[[5, 2]][kept], rtol=0, atol=1e-4 * scale)


def test_distillation_lowers_the_held_out_error_and_is_deterministic(made: Case) -> None:
    recording = load_recording(made.stats.recording)
    before = {name: site.weight.clone() for name, site in made.state.items()}
    layers, mixer, made_by = distil(made.unit, made.state, Distances, recording)
    training = made_by.report
    assert training["error"] < training["error_before"] / 4
    assert training["error_trained"] == min(entry[2] for entry in training["curve"])
    assert training["error"] <= training["error_trained"]
    assert training["steps"] == 40 or training["ended"] == "patience"
    assert training["rates"][f"{training['rate']:g}"] == min(training["rates"].values())
    assert training["tokens"] > 4 * training["held_out_tokens"] > 0
    assert all(torch.equal(before[name], site.weight) for name, site in made.state.items())
    torch.manual_seed(99)  # nothing depends on it
    again, same, twice = distil(made.unit, made.state, Distances, recording)
    assert {**twice.report, "seconds": 0} == {**training, "seconds": 0}
    for name, (weight, bias) in layers.items():
        assert torch.equal(weight, again[name][0])
        assert bias is None or torch.equal(bias, again[name][1])
    assert all(
        torch.equal(value, same.parameters[name]) for name, value in mixer.parameters.items()
    )


def test_the_error_told_is_that_of_the_installed_unit(made: Case) -> None:
    """Independently: the replaced model's sublayer against the teacher's, on all sequences."""
    state = replaced(made, DISTANCES)
    recording = load_recording(made.stats.recording)
    teacher = Sublayer(recording, made.unit, made.state)
    model = copy_for_surgery(teacher.model)
    install(model, made.unit, state)
    output = state[next(site.name for site in made.unit.sites if site.role == "output")]
    assert output.training is not None
    student = Sublayer(recording, made.unit, made.state)
    student.model = model
    error = energy = 0.0
    number, every = 0, SHORT.held_out
    for call in recording.calls:
        with torch.no_grad():
            y, found = teacher.run(call), student.run(call)
        for row in range(len(y)):
            if (number + row) % every == every - 1:
                real = slice(0, int(call.lengths[row]))
                error += float((y[row, real] - found[row, real]).square().sum())
                energy += float((y[row, real] - output_bias(made)).square().sum())
        number += len(y)
    assert error / energy == pytest.approx(output.training.report["error"], rel=0.02)


def output_bias(one: Case) -> torch.Tensor:
    bias = one.state[next(site.name for site in one.unit.sites if site.role == "output")].bias
    return torch.zeros(()) if bias is None else bias


@pytest.mark.parametrize("step", [ELU, DISTANCES], ids=["elu", "distances"])
def test_statistics_are_those_of_the_installed_model(made: Case, step: Step) -> None:
    state = replaced(made, step)
    name = next(site.name for site in made.unit.sites if site.role == "output")
    training = state[name].training
    assert training is not None
    assert training.stats is not None
    model = copy_for_surgery(made.model)
    install(model, made.unit, state)
    accumulator = Accumulator({name: model.get_submodule(name)})
    for batch in made.batches:
        mask = batch.get("attention_mask")
        with torch.no_grad(), accumulator.watching(None if mask is None else mask.bool()):
            model(**batch)
    expected = accumulator.stats([name])[name]
    assert training.stats.count == expected.count
    scale = float(expected.gram.abs().max())
    torch.testing.assert_close(training.stats.gram, expected.gram, rtol=0, atol=2e-3 * scale)
    for part in ("mean", "low", "high", "sample"):
        found, wanted = getattr(training.stats, part), getattr(expected, part)
        largest = float(expected.sample.abs().max())  # type: ignore[union-attr]
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-2 * largest)


def test_bits_behind_a_mixer_are_solved_on_its_statistics(made: Case) -> None:
    bits = Step.of("gptq", weights=4, activations=32, group=16)
    prefix = replaced(made, DISTANCES)
    both = apply_step(made.unit, prefix, bits, dict(made.stats))
    name = next(site.name for site in made.unit.sites if site.role == "output")
    training = prefix[name].training
    assert training is not None
    assert training.stats is not None
    by_hand = OPERATORS.get("gptq").apply(
        made.unit, prefix, bits, {**made.stats, name: training.stats}
    )
    assert_same(both, by_hand, "replace, then bits")
    assert both[name].mixer is not None
    unaware = OPERATORS.get("gptq").apply(made.unit, prefix, bits, dict(made.stats))
    assert not torch.equal(unaware[name].weight, both[name].weight)
    formats = option_formats(made.unit, Option((DISTANCES, bits)))
    assert formats == {site: state.format for site, state in both.items()}
    assert formats[name].mixer == "distances"


def test_the_clock_ends_training_and_the_best_state_so_far_is_kept(made: Case) -> None:
    recording = load_recording(made.stats.recording)
    _, _, training = distil(
        made.unit, made.state, Distances, recording, replace(SHORT, seconds=0.0, rates=(1e-2,))
    )
    assert training.report["ended"] == "clock"
    assert training.report["steps"] == 1
    assert training.report["error"] <= training.report["error_before"]


class Clock:
    """Shows one second more at every look, and a thousand more from look number `jump` on."""

    def __init__(self, jump: int | None = None) -> None:
        self.looks, self.jump = 0, jump

    def perf_counter(self) -> float:
        self.looks += 1
        late = self.jump is not None and self.looks >= self.jump
        return self.looks + (1000.0 if late else 0.0)


SLOW = Settings(
    steps=200, warm_up=5, trial_steps=20, check_every=100, rates=(1e-2, 3e-2), seconds=60.0
)


def test_a_run_that_the_clock_ends_before_a_look_is_looked_at(
    made: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And trials have a third of the time: 20 looks for them, and then 39 steps of the run."""
    monkeypatch.setattr(distil_module, "time", Clock())
    recording = load_recording(made.stats.recording)
    training = distil(made.unit, made.state, Distances, recording, SLOW)[2].report
    assert training["ended"] == "clock"
    assert 30 <= training["steps"] <= 40
    assert [entry[0] for entry in training["curve"]] == [0, training["steps"]]
    assert training["error_trained"] < min(training["rates"].values())
    assert max(training["rates"].values()) < training["error_before"]


def test_what_a_trial_found_is_kept_where_the_clock_leaves_the_run_no_time(
    made: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil_module, "time", Clock(jump=22))
    recording = load_recording(made.stats.recording)
    training = distil(made.unit, made.state, Distances, recording, SLOW)[2].report
    assert training["ended"] == "clock"
    assert 1 < training["steps"] <= 6
    assert training["error_trained"] == min(training["rates"].values())
    assert training["error_trained"] < training["error_before"]


@pytest.mark.parametrize(
    ("rates", "tried"),
    [
        ((1e-5, 3e-5), ["1e-05", "3e-05", "9e-05", "0.00027"]),
        ((9.0, 27.0), ["1", "3", "9", "27"]),
        ((1e-6, 3e-3, 1e3), ["1e-06", "0.003", "1000"]),
    ],
    ids=["up", "down", "inside"],
)
def test_rates_beyond_the_outermost_are_tried_while_it_is_the_best(
    made: Case, rates: tuple[float, ...], tried: list[str]
) -> None:
    recording = load_recording(made.stats.recording)
    settings = replace(SHORT, rates=rates, steps=2)
    training = distil(made.unit, made.state, Distances, recording, settings)[2].report
    assert list(training["rates"]) == tried


def test_a_single_sequence_is_enough(tmp_path: Path) -> None:
    one = case("bert", tmp_path)
    recording = load_recording(one.stats.recording)
    recording.calls = [recording.calls[0].rows(torch.tensor([3]))]
    _, _, training = distil(one.unit, one.state, Distances, recording, replace(SHORT, steps=5))
    assert training.report["held_out_tokens"] == 0
    assert training.report["error"] <= training.report["error_before"]


def units(name: str = "bert") -> dict[str, Unit]:
    register()
    return {unit.name: unit for unit in EXAMPLES[name].units()}


def test_options_are_one_per_mixer_and_none() -> None:
    rule = Rule(
        {"replace": ["elu", "distances"]},
        {"method": "gptq", "weights": ["dense", 8]},
    )
    unit = units()["layers.0.attention"]
    labels = [option.label() for option in unit_options(unit, rule)]
    bits = "gptq activations=32 group=0 weights=8"
    assert labels == [
        "dense",
        bits,
        "replace mixer=elu",
        f"replace mixer=elu + {bits}",
        "replace mixer=distances",
        f"replace mixer=distances + {bits}",
    ]


def test_refuses_what_cannot_be() -> None:
    operator, known = OPERATORS.get("replace"), units()
    assert operator.options(known["layers.0.ffn"], Rule({})) == []
    with pytest.raises(UserError, match=r"kind ffn .*Match layers\.\*\.attention"):
        operator.options(known["layers.0.ffn"], Rule({"replace": ["elu"]}))
    with pytest.raises(UserError, match=r"unknown mixer 'ell'\. Did you mean 'elu'"):
        operator.options(known["layers.0.attention"], Rule({"replace": ["ell"]}))
    wide = replace(known["layers.0.attention"], heads=8)
    with pytest.raises(UserError, match="distances cannot stand there: it knows five heads"):
        operator.options(wide, Rule({"replace": ["distances"]}))
    with pytest.raises(UserError, match="must be a list"):
        operator.options(wide, Rule({"replace": "elu"}))


def test_without_a_recording_nothing_is_trained(made: Case) -> None:
    with pytest.raises(InternalError, match="not recorded"):
        apply_step(made.unit, made.state, ELU, dict(made.stats))


class TestContract(RecordedContract):
    steps = (ELU, DISTANCES)

    @pytest.fixture
    def operator(self) -> Operator:
        return OPERATORS.get("replace")

    def rules(self) -> list[Rule]:
        return [Rule({"replace": ["elu", "distances"]})]


@pytest.mark.parametrize(
    "steps",
    [
        (Step.of("sparsegpt", level=0.5), Step.of("gptq", weights=8, activations=32, group=0)),
        (Step.of("rtn", weights=8, activations=8, group=0, range="mse"),),
        (Step.of("smoothquant", weights=8, activations=8, group=0, migration=0.5),),
        (Step.of("awq", weights=4, activations=32, group=16),),
    ],
    ids=lambda steps: steps[0].operator,
)
def test_later_steps_keep_the_mixer(made: Case, steps: tuple[Step, ...]) -> None:
    """And their formats are those foreseen; a static range is that of the mixer's output."""
    state = replaced(made, DISTANCES)
    for step in steps:
        state = apply_step(made.unit, state, step, dict(made.stats))
    formats = option_formats(made.unit, Option((DISTANCES, *steps)))
    assert formats == {name: site.format for name, site in state.items()}
    output = next(site for site in state.values() if site.mixer is not None)
    assert output.training is not None
    assert output.training.stats is not None
    if output.input_range is not None:
        assert output.training.stats.low is not None
        assert output.input_range[0] >= float(output.training.stats.low.min()) - 1e-5
    model = copy_for_surgery(made.model)
    install(model, made.unit, state)
    with torch.no_grad():
        assert torch.isfinite(model(**made.batches[0]).logits).all()
