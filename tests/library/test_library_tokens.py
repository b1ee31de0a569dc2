"""Token steps need no items of their own; the stitched model has its weights and fewer tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_examples import EXAMPLES, logits

from autocomp.calibrate.stream import calibrate, fingerprint
from autocomp.core.candidate import Candidate, Option, Step
from autocomp.core.tokens import TokenReduction
from autocomp.library.build import build, plan_build
from autocomp.library.stitch import stitch
from autocomp.library.store import Library
from autocomp.models.surgery import copy_for_surgery
from autocomp.models.tokens import install_tokens, model_reductions
from autocomp.operators import unit_options
from autocomp.operators.protocol import Rule

RULE = Rule(
    structure={"skip": True},
    bits={"method": "rtn", "weights": ["dense", 8], "activations": ["dense"]},
    tokens={"method": ["tome", "token_prune"], "ratios": [0.0, 0.25]},
)
MERGE = Step.of("tome", ratio=0.25)
INT8 = Step.of("rtn", weights=8, activations=32, group=0)


@pytest.mark.parametrize("layout", ["vit", "dinov2"])
def test_options_that_differ_in_tokens_alone_share_an_item(layout: str, tmp_path: Path) -> None:
    example = EXAMPLES[layout]
    model, units = example.model(), example.units()
    model.save_pretrained(tmp_path / "teacher")  # type: ignore[operator]
    attention = [unit for unit in units if unit.kind == "attention"]
    options = {unit.name: unit_options(unit, RULE) for unit in attention}
    assert [len(o) for o in options.values()] == [7, 7, 7]
    inputs = example.inputs()
    paths: dict[str, Path] = {}
    for _, files in calibrate(model, units, [inputs], tmp_path / "stats"):
        paths |= files
    library = Library(tmp_path / "library")
    plan = plan_build(tmp_path / "teacher", units, options, paths, fingerprint([inputs]), library)
    assert plan.missing == 3  # 8 bits at each unit
    assert len(plan.keys) == 9
    assert len(set(plan.keys.values())) == 3
    assert len(build(plan)) == 3

    chosen = {unit.name: Option() for unit in units}
    chosen["layers.0.attention"] = Option((MERGE,))
    alone = stitch(model, units, library, plan.keys, Candidate.of(chosen))
    reduction = {"layers.0.attention": TokenReduction("tome", 0.25, 1)}
    assert model_reductions(alone) == reduction
    expected = copy_for_surgery(model)
    install_tokens(expected, units, reduction)
    assert torch.equal(logits(alone, inputs), logits(expected, inputs))

    chosen["layers.0.attention"] = Option((MERGE, INT8))
    both = stitch(model, units, library, plan.keys, Candidate.of(chosen))
    chosen["layers.0.attention"] = Option((INT8,))
    bits = stitch(model, units, library, plan.keys, Candidate.of(chosen))
    assert model_reductions(bits) == {}
    assert model_reductions(both) == reduction
    install_tokens(bits, units, reduction)
    assert torch.equal(logits(both, inputs), logits(bits, inputs))
    assert not torch.equal(logits(both, inputs), logits(alone, inputs))
