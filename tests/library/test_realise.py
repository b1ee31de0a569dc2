"""Sequential realisation: each unit is made of what the compressed units before it give."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_examples import EXAMPLES, logits
from test_library_build import Setting
from torch import Tensor, nn

from autocomp.calibrate.sequence import unit_by_unit
from autocomp.calibrate.stats import load_stats
from autocomp.calibrate.stream import calibrate
from autocomp.core.candidate import Candidate, Option, Step
from autocomp.core.unit import Unit
from autocomp.library.build import build, load_unit
from autocomp.library.realise import corrected, realise, realised
from autocomp.library.stitch import stitch
from autocomp.models.surgery import install
from autocomp.operators import apply_option
from autocomp.operators.gram import damping_for


@pytest.fixture(params=["bert", "llama", "vit"])
def setting(request: pytest.FixtureRequest, tmp_path: Path) -> Setting:
    return Setting(EXAMPLES[request.param], tmp_path)


def hard(setting: Setting) -> Candidate:
    """Every unit pruned: by operators that look at their inputs, and round nothing."""
    chosen: dict[str, Option] = {}
    for unit in setting.units:
        names = [[step.operator for step in option.steps] for option in setting.options[unit.name]]
        wanted = next((n for n in names if n in (["heads"], ["width"])), [])
        chosen[unit.name] = setting.options[unit.name][names.index(wanted)]
    return Candidate.of(chosen)


def test_of_a_model_left_alone_they_are_what_calibration_saw(setting: Setting) -> None:
    needs = {u.name: {"gram", "range"} for u in setting.units if u.kind != "embedding"}
    batch = setting.example.inputs(batch=6)
    model = copy.deepcopy(setting.model)
    scratch = setting.root / "s"
    found = list(unit_by_unit(model, setting.model, setting.units, [batch], scratch, needs))
    assert [seen.unit.name for seen in found] == [u.name for u in setting.units if u.name in needs]
    for seen in found:
        known = load_stats(setting.stats[seen.unit.name])
        assert set(seen.stats) == set(known) == set(seen.crossed)
        for site, its in seen.stats.items():
            assert its.count == known[site].count
            assert torch.equal(its.gram, known[site].gram)
            assert torch.equal(its.mean, known[site].mean)
            torch.testing.assert_close(seen.crossed[site], its.gram)
        dense = load_unit(setting.path, seen.unit)
        for name, site in corrected(dense, seen).items():
            torch.testing.assert_close(site.weight, dense[name].weight, rtol=1e-4, atol=1e-5)
    assert list(scratch.iterdir()) == []


def test_each_unit_is_refitted_and_made_on_what_the_compressed_model_gives_it(
    setting: Setting,
) -> None:
    """Against running both whole models anew in front of every unit, solved in float64."""
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
    expected = copy.deepcopy(setting.model)
    needs = realised(candidate, setting.units)
    assert len(needs) >= 4
    for unit in setting.units:
        if unit.name not in needs:
            continue
        directory = setting.root / f"to-{unit.name}"
        for _ in calibrate(
            copy.deepcopy(expected), setting.units, [batch], directory, needs={unit.name: {"gram"}}
        ):
            pass
        stats = load_stats(directory / f"{unit.name}.safetensors")
        x, y = inputs_of(setting.model, unit, batch), inputs_of(expected, unit, batch)
        dense = load_unit(setting.path, unit)
        refitted = {}
        for name, site in dense.items():
            weight = site.weight.double()
            damping = damping_for(weight.shape[1], len(x[name]))
            ridge = damping * (y[name] ** 2).sum(0).mean() * torch.eye(weight.shape[1]).double()
            # min over W' of ‖Y W'ᵀ − X Wᵀ‖² + λ ‖W' − W‖²
            right = y[name].t() @ x[name] @ weight.t() + ridge @ weight.t()
            solved = torch.linalg.solve(y[name].t() @ y[name] + ridge, right)
            refitted[name] = replace(site, weight=solved.t().float())
        install(expected, unit, apply_option(unit, refitted, candidate[unit.name], stats))
    inputs = setting.example.inputs(batch=3)
    mine, its = logits(found, inputs), logits(expected, inputs)
    torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)
    stitched = stitch(setting.model, setting.units, setting.library, plan.keys, candidate)
    assert (mine - its).abs().max() < 0.05 * (mine - logits(stitched, inputs)).abs().max()


def inputs_of(model: nn.Module, unit: Unit, batch: dict[str, torch.Tensor]) -> dict[str, Tensor]:
    """What each site of a unit reads at real tokens, float64 `(N, columns)`."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda _, args, name=site.name: seen.__setitem__(name, args[0])
        )
        for site in unit.sites
    ]
    logits(model, batch)
    for handle in handles:
        handle.remove()
    mask = batch.get("attention_mask")
    return {
        name: (
            value[mask.bool()]
            if mask is not None and value.shape[:2] == mask.shape
            else value.reshape(-1, value.shape[-1])
        ).double()
        for name, value in seen.items()
    }


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
