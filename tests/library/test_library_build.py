"""Building and stitching: nothing twice, nothing missing, and the model that comes out is right."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_examples import EXAMPLES, Example, logits
from safetensors.torch import load_file, save_file
from torch import nn

from autocomp.calibrate.stats import load_stats
from autocomp.calibrate.stream import calibrate, fingerprint
from autocomp.core.candidate import Candidate, Option, Step
from autocomp.core.errors import InternalError, ModelError
from autocomp.core.unit import Unit
from autocomp.library import build as build_module
from autocomp.library.build import (
    BuildPlan,
    build,
    build_unit,
    load_unit,
    plan_build,
    unit_digest,
)
from autocomp.library.stitch import stitch
from autocomp.library.store import Library, item_key
from autocomp.models.conversion import save_model
from autocomp.models.modules import QuantEmbedding, QuantLinear
from autocomp.operators import apply_option, apply_step, unit_options
from autocomp.operators.protocol import Rule, UnitState, UnitStats
from autocomp.targets.peak_memory import reset_peak

RULES = {
    "attention": Rule(
        {"heads": [1.0, 0.5], "skip": True},
        {"method": "gptq", "weights": ["dense", 8, 4], "activations": ["dense", 8], "group": 16},
    ),
    "ffn": Rule(
        {"width": [1.0, 0.5], "rank": [1.0, 0.5], "skip": True},
        {"method": ["gptq", "rtn"], "weights": ["dense", 8]},
    ),
    "embedding": Rule(
        {"rank": [1.0, 0.5]}, {"method": "rtn", "weights": ["dense", 8, 4], "group": 16}
    ),
    "head": Rule({}, {"method": "gptq", "weights": ["dense", 8]}),
}


class Setting:
    """A saved teacher, its units, options, statistics and a library beside it."""

    def __init__(self, example: Example, root: Path) -> None:
        self.example, self.root = example, root
        self.model = example.model()
        self.path = root / "teacher"
        save_model(self.model, self.path)
        self.units: list[Unit] = example.units()
        self.options = {unit.name: unit_options(unit, RULES[unit.kind]) for unit in self.units}
        self.stats: dict[str, Path] = {}
        batch = example.inputs(batch=6)
        for _, files in calibrate(self.model, self.units, [batch], root / "stats"):
            self.stats |= files
        self.fingerprint = fingerprint([batch])
        self.library = Library(root / "library")

    def plan(self, library: Library | None = None) -> BuildPlan:
        return plan_build(
            self.path,
            self.units,
            self.options,
            self.stats,
            self.fingerprint,
            library or self.library,
        )

    def unit(self, name: str) -> Unit:
        return next(unit for unit in self.units if unit.name == name)


@pytest.fixture(params=["bert", "vit", "dinov2", "llama", "gpt2"])
def setting(request: pytest.FixtureRequest, tmp_path: Path) -> Setting:
    return Setting(EXAMPLES[request.param], tmp_path)


@pytest.fixture
def bert(tmp_path: Path) -> Setting:
    return Setting(EXAMPLES["bert"], tmp_path)


def test_builds_everything_once(setting: Setting) -> None:
    plan, calls = setting.plan(), []
    with_item = sum(
        1
        for options in setting.options.values()
        for option in options
        if not option.dense and option.step("skip") is None
    )
    assert plan.missing == len(plan.keys) == with_item > 20
    items = build(plan, progress=lambda done, total: calls.append((done, total)))
    assert sorted(item.key for item in items) == sorted(plan.keys.values())
    assert calls[-1] == (with_item, with_item)
    again = setting.plan()
    assert again.missing == 0
    assert again.tasks == []
    assert again.keys == plan.keys


def test_items_are_what_the_operators_give(setting: Setting) -> None:
    """Sharing work among options changes no item; weights come from the right tensors."""
    plan = setting.plan()
    build(plan)
    for unit in setting.units:
        parameters = {
            site.name: setting.model.get_submodule(site.name).weight for site in unit.sites
        }
        dense = load_unit(setting.path, unit)
        assert all(torch.equal(dense[name].weight, value) for name, value in parameters.items())
        for option in setting.options[unit.name]:
            key = plan.keys.get((unit.name, option.key))
            if key is None:
                continue
            stats = load_stats(setting.stats[unit.name]) if unit.name in setting.stats else {}
            alone = apply_option(unit, load_unit(setting.path, unit), option, stats)
            stored = setting.library.get(key)
            assert stored is not None
            for name, site in alone.items():
                assert torch.equal(stored[name].weight, site.weight), (option.label(), name)
                assert stored[name].format == site.format


def test_what_is_missing_alone_is_built(bert: Setting) -> None:
    plan = bert.plan()
    items = build(plan)
    gone = items[5]
    bert.library.drop(gone.key)
    path = bert.library.path(items[9].key)
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 4
    path.write_bytes(damaged)
    again = bert.plan(Library(bert.library.root))
    rebuilt = {key for task in again.tasks for _, key in task.options}
    assert rebuilt == {gone.key, items[9].key}
    assert {item.key for item in build(again)} == rebuilt


def test_an_interrupted_task_goes_on_where_it_was(
    bert: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = bert.plan().tasks[0]
    put, count = Library.put, 0

    def interrupted(self: Library, *arguments: object, **named: object) -> int:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return put(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Library, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_unit(task)
    monkeypatch.undo()
    rest = next(t for t in bert.plan().tasks if t.unit == task.unit)
    assert len(rest.options) == len(task.options) - 2


def test_a_task_is_small_and_runs_elsewhere(bert: Setting) -> None:
    plan = bert.plan()
    assert all(len(pickle.dumps(task)) < 20_000 for task in plan.tasks)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        items = build(BuildPlan(plan.tasks[-1:], plan.keys), pool.imap_unordered)
    assert len(items) == len(plan.tasks[-1].options)
    assert all(bert.library.contains(item.key) for item in items)


def test_items_say_how_they_fared(bert: Setting) -> None:
    plan = bert.plan()
    items = {(item.unit, item.option.label()): item for item in build(plan)}
    unit, down = "layers.1.ffn", "bert.encoder.layer.1.output.dense"
    gptq = items[unit, "gptq activations=32 group=0 weights=8"]
    rtn = items[unit, "rtn activations=32 group=0 weights=8"]
    pruned = items[unit, "width keep=24"]
    assert 0 < gptq.error[down] < rtn.error[down] < 1e-3
    assert 0 < pruned.error[down] < 1
    assert pruned.error["bert.encoder.layer.1.intermediate.dense"] == 0.0
    assert gptq.seconds > 0
    assert gptq.size_bytes == bert.library.path(gptq.key).stat().st_size
    # Independent: the pruned down projection on the inputs that reach it in the dense model.
    inputs: list[torch.Tensor] = []
    batch = bert.example.inputs(batch=6)
    hook = bert.model.get_submodule(down).register_forward_pre_hook(
        lambda module, args: inputs.append(args[0])
    )
    logits(bert.model, batch)
    hook.remove()
    x = inputs[0][batch["attention_mask"].bool()].double()
    state, dense = bert.library.get(pruned.key), bert.model.get_submodule(down)
    assert state is not None
    site = state[down]
    before = x @ dense.weight.double().t()
    after = x[:, site.kept_columns] @ site.weight.double().t() + site.bias.double()
    error = (
        after - before - dense.bias.double()
    ).detach().square().sum() / before.square().sum().detach()
    assert pruned.error[down] == pytest.approx(error.item(), rel=1e-3)
    info = bert.library.describe(gptq.key)
    assert info is not None
    assert info["option"] == gptq.option.to_json()


def test_an_item_has_the_memory_of_its_own_making(
    bert: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first of two options holds 300 MB for a moment; the second does not inherit it."""
    if not reset_peak():
        pytest.skip("this system cannot count the peak anew")
    made: list[str] = []

    def hungry(unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        if not made:
            held = torch.ones(75_000_000)
            assert float(held[-1]) == 1.0
        made.append(step.label())
        return apply_step(unit, state, step, stats)

    monkeypatch.setattr(build_module, "apply_step", hungry)
    task = next(
        task for task in bert.plan(Library(tmp_path / "other")).tasks if len(task.options) > 1
    )
    items = build_unit(task)
    assert len(made) > 1
    assert items[0].peak_bytes - items[-1].peak_bytes > 250e6
    assert items[-1].peak_bytes > 50e6
    described = Library(tmp_path / "other").describe(items[0].key)
    assert described is not None
    assert described["peak_bytes"] == items[0].peak_bytes


def test_nan_is_refused_by_name(bert: Setting) -> None:
    file = bert.path / "model.safetensors"
    tensors = load_file(file)
    name = "bert.encoder.layer.1.output.dense.weight"
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layer\.1\.output\.dense\.weight holds NaN"):
        bert.plan()
    with pytest.raises(ModelError, match=r"layer\.1\.output\.dense\.weight holds NaN"):
        load_unit(bert.path, bert.unit("layers.1.ffn"))


def test_a_missing_or_misshapen_tensor_is_refused_by_name(bert: Setting) -> None:
    unit = bert.unit("head")
    wider = replace(unit, sites=tuple(replace(site, rows=site.rows + 1) for site in unit.sites))
    with pytest.raises(ModelError, match=r"is \(.*\), not"):
        load_unit(bert.path, wider)
    renamed = replace(unit, sites=(replace(unit.sites[0], name="absent"),))
    with pytest.raises(ModelError, match=r"no tensor absent\.weight"):
        load_unit(bert.path, renamed)


def test_the_digest_follows_the_weights(bert: Setting) -> None:
    unit = bert.unit("layers.0.ffn")
    digest = unit_digest(bert.path, unit)
    assert digest == unit_digest(bert.path, unit)
    with torch.no_grad():
        bert.model.get_submodule(unit.sites[0].name).bias[0] += 1
    bert.model.save_pretrained(bert.path)
    assert digest != unit_digest(bert.path, unit)
    assert unit_digest(bert.path, bert.unit("layers.1.ffn")) != digest


def test_dense_stitches_to_the_teacher(setting: Setting) -> None:
    model = stitch(setting.model, setting.units, setting.library, {}, Candidate.of({}))
    inputs = setting.example.inputs()
    assert torch.equal(logits(model, inputs), logits(setting.model, inputs))


def test_stitched_equals_put_together_by_hand(setting: Setting) -> None:
    """Weights that keep their shape are written into a copy of the teacher: same logits."""
    plan = setting.plan()
    build(plan)
    chosen: dict[str, Option] = {}
    by_hand = copy.deepcopy(setting.model)
    for unit in setting.units:
        option = next(
            (
                option
                for option in setting.options[unit.name]
                if len(option.steps) == 1 and option.steps[0].operator in ("gptq", "rtn")
                if option.steps[0]["activations"] == 32
            ),
            Option(),
        )
        if unit.tied_to is not None or option.dense:
            continue
        chosen[unit.name] = option
        state = setting.library.get(plan.keys[unit.name, option.key])
        assert state is not None
        for name, site in state.items():
            module = by_hand.get_submodule(name)
            module.weight = nn.Parameter(site.weight)
    assert len(chosen) > 5
    model = stitch(setting.model, setting.units, setting.library, plan.keys, Candidate.of(chosen))
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    inputs = setting.example.inputs()
    expected = logits(by_hand, inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(setting.model, inputs), atol=1e-3)


def test_every_option_stitches_and_runs(setting: Setting) -> None:
    plan = setting.plan()
    build(plan)
    before = {name: value.clone() for name, value in setting.model.state_dict().items()}
    inputs = setting.example.inputs()
    dense = logits(setting.model, inputs)
    longest = max(len(options) for options in setting.options.values())
    for number in range(longest):
        candidate = Candidate.of(
            {
                name: options[number % len(options)]
                for name, options in setting.options.items()
                if not (setting.unit(name).tied_to and number == 0)
            }
        )
        model = stitch(setting.model, setting.units, setting.library, plan.keys, candidate)
        output = logits(model, inputs)
        assert output.shape == dense.shape
        assert torch.isfinite(output).all()
    assert all(torch.equal(v, before[n]) for n, v in setting.model.state_dict().items())
    assert torch.equal(logits(setting.model, inputs), dense)


def test_a_quantised_table_is_installed(bert: Setting) -> None:
    plan = bert.plan()
    build(plan)
    option = bert.options["embeddings"][1]
    candidate = Candidate.of({"embeddings": option})
    model = stitch(bert.model, bert.units, bert.library, plan.keys, candidate)
    table = model.get_submodule(bert.unit("embeddings").sites[0].name)
    assert isinstance(table, QuantEmbedding)


def test_a_missing_item_is_rebuilt_if_the_caller_can(bert: Setting) -> None:
    plan = bert.plan()
    build(plan)
    option = Option((Step.of("width", keep=24),))
    key = plan.keys["layers.0.ffn", option.key]
    candidate = Candidate.of({"layers.0.ffn": option})
    bert.library.drop(key)
    with pytest.raises(
        InternalError, match=r"has no item for layers\.0\.ffn under 'width keep=24'"
    ):
        stitch(bert.model, bert.units, bert.library, plan.keys, candidate)

    def rebuild(unit: Unit, option: Option) -> None:
        assert unit.name == "layers.0.ffn"
        build(bert.plan())

    model = stitch(bert.model, bert.units, bert.library, plan.keys, candidate, rebuild=rebuild)
    assert model.get_submodule("bert.encoder.layer.0.intermediate.dense").weight.shape[0] == 24
    with pytest.raises(InternalError, match="has no item"):
        stitch(bert.model, bert.units, bert.library, {}, candidate, rebuild=rebuild)


def test_rounding_to_nearest_needs_no_statistics(bert: Setting, tmp_path: Path) -> None:
    """Neither file nor directory is there, and the items are those built beside other options."""
    beside = bert.plan()
    assert {"gram"} <= beside.needs["layers.0.ffn"]
    build(beside)
    rule = Rule(bits={"method": ["rtn", "hqq"], "weights": [8, 4], "activations": [8]})
    options = {unit.name: unit_options(unit, rule) for unit in bert.units}
    missing = {unit.name: tmp_path / "nowhere" / unit.name for unit in bert.units}
    library = Library(tmp_path / "other")
    plan = plan_build(bert.path, bert.units, options, missing, bert.fingerprint, library)
    assert plan.needs == {}
    assert all(task.stats_path is None for task in plan.tasks)
    assert len(build(plan)) == plan.missing > 0
    shared = set(plan.keys.values()) & set(beside.keys.values())
    assert shared, "a key does not depend on what else is asked for"
    for key in shared:
        one, other = library.get(key), bert.library.get(key)
        assert one is not None
        assert other is not None
        for name in one:
            torch.testing.assert_close(one[name].weight, other[name].weight, rtol=0, atol=0)


def test_needs_are_those_of_missing_items(bert: Setting, tmp_path: Path) -> None:
    static = Rule(bits={"method": "rtn", "weights": [8], "activations": ["static"]})
    ffn, attention = bert.unit("layers.0.ffn"), bert.unit("layers.0.attention")
    options = {
        ffn.name: unit_options(ffn, static),
        attention.name: unit_options(attention, Rule(bits={"method": "gptq", "weights": [8]})),
    }
    library = Library(tmp_path / "other")

    def plan() -> BuildPlan:
        return plan_build(bert.path, bert.units, options, bert.stats, bert.fingerprint, library)

    assert plan().needs == {ffn.name: {"range"}, attention.name: {"gram"}}
    for task in plan().tasks:
        if task.unit.name == attention.name:
            build_unit(task)
    assert plan().needs == {ffn.name: {"range"}}


def test_levels_may_be_shares_and_patterns(bert: Setting, tmp_path: Path) -> None:
    """Steps whose arguments are of two types cannot be sorted, and need not be."""
    ffn = bert.unit("layers.0.ffn")
    rule = Rule(sparsity={"method": "magnitude", "levels": [0.5, "2:4"]})
    options, stats = {ffn.name: unit_options(ffn, rule)}, {ffn.name: bert.stats[ffn.name]}
    library = Library(tmp_path / "other")
    plan = plan_build(bert.path, [ffn], options, stats, bert.fingerprint, library)
    assert len(build(plan)) == 2


def test_a_key_is_what_it_was() -> None:
    """Libraries are shared between versions: a key changes with what it stands for alone."""
    option = Option((Step.of("rtn", weights=8, activations=8, group=0),))
    key = item_key("weights", option, "statistics")
    assert key == "05eb584bf25dabd45c781be566fda12691b8ac2d"
