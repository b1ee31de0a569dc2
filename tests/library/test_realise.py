"""Sequential realisation: each unit is made of what the compressed units before it give."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from model_examples import EXAMPLES, logits
from test_library_build import Setting

from autocomp.calibrate.sequence import unit_by_unit
from autocomp.calibrate.stats import load_stats
from autocomp.calibrate.stream import calibrate
from autocomp.core.candidate import Candidate, Option, Step
from autocomp.library.build import build, load_unit
from autocomp.library.realise import realise, realised
from autocomp.library.stitch import stitch
from autocomp.models.surgery import install
from autocomp.operators import apply_option, weight_option


@pytest.fixture(params=["bert", "llama", "vit"])
def setting(request: pytest.FixtureRequest, tmp_path: Path) -> Setting:
    return Setting(EXAMPLES[request.param], tmp_path)


def hard(setting: Setting) -> Candidate:
    """Every unit pruned and at 4 or 8 bits, chosen by its inputs where it has any."""
    chosen: dict[str, Option] = {}
    for unit in setting.units:
        offered = [option for option in setting.options[unit.name] if len(option.steps) > 1]
        offered += [option for option in setting.options[unit.name] if option.steps]
        chosen[unit.name] = next(
            (option for option in offered if option.step("gptq") is not None), offered[0]
        )
    return Candidate.of(chosen)


def test_statistics_of_a_model_left_alone_are_those_of_calibration(setting: Setting) -> None:
    needs = {u.name: {"gram", "range"} for u in setting.units if u.kind != "embedding"}
    batch = setting.example.inputs(batch=6)
    found = {
        unit.name: stats
        for unit, stats in unit_by_unit(
            setting.model, setting.units, [batch], setting.root / "s", needs
        )
    }
    assert list(found) == [unit.name for unit in setting.units if unit.name in needs]
    for name, stats in found.items():
        known = load_stats(setting.stats[name])
        assert set(stats) == set(known)
        for site, its in stats.items():
            assert its.count == known[site].count
            assert torch.equal(its.gram, known[site].gram)
            assert torch.equal(its.mean, known[site].mean)
    assert list((setting.root / "s").iterdir()) == []


def test_each_unit_is_made_on_what_the_compressed_model_gives_it(setting: Setting) -> None:
    """Against calibrating the whole model anew, in front of every unit."""
    plan = setting.plan()
    build(plan)
    candidate = hard(setting)
    batch = setting.example.inputs(batch=6)
    found = realise(
        setting.model,
        setting.path,
        setting.units,
        setting.library,
        plan.keys,
        candidate,
        [batch],
        setting.root / "scratch",
    )
    kept = {u.name: candidate[u.name] for u in setting.units if u.kind == "embedding"}
    expected = stitch(setting.model, setting.units, setting.library, plan.keys, Candidate.of(kept))
    needs = realised(candidate, setting.units)
    assert set(needs) == set(candidate.by_unit) - set(kept)
    for unit in setting.units:
        if unit.name not in needs:
            continue
        directory = setting.root / f"to-{unit.name}"
        for _ in calibrate(
            copy.deepcopy(expected),
            setting.units,
            [batch],
            directory,
            needs={unit.name: needs[unit.name]},
        ):
            pass
        stats = load_stats(directory / f"{unit.name}.safetensors")
        dense = load_unit(setting.path, unit)
        install(
            expected, unit, apply_option(unit, dense, weight_option(candidate[unit.name]), stats)
        )
    mine, its = found.state_dict(), expected.state_dict()
    assert set(mine) == set(its)
    for name, value in mine.items():
        torch.testing.assert_close(value, its[name], rtol=1e-5, atol=1e-6, msg=name)
    stitched = stitch(setting.model, setting.units, setting.library, plan.keys, candidate)
    inputs = setting.example.inputs(batch=3)
    assert not torch.equal(logits(found, inputs), logits(stitched, inputs))


def test_what_reads_no_inputs_or_is_trained_stays_as_it_is() -> None:
    example = EXAMPLES["bert"]
    units = example.units()
    attention = next(unit for unit in units if unit.kind == "attention")
    ffn = next(unit for unit in units if unit.kind == "ffn")
    gptq = Step.of("gptq", weights=8, activations=32, group=0)
    chosen = {
        attention.name: Option((Step.of("replace", mixer="hedgehog"), gptq)),
        ffn.name: Option((Step.of("rtn", weights=8, activations=32, group=0),)),
    }
    assert realised(Candidate.of(chosen), units) == {}
