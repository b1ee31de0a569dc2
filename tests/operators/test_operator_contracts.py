"""Every registered operator keeps the contract, and the contract catches those that do not.

What trains needs inputs that were recorded: see `test_replace` and `test_groups`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autocomp.core.candidate import Step
from autocomp.core.unit import SiteFormat, Unit
from autocomp.operators import OPERATORS, apply_option, option_formats, unit_options
from autocomp.operators.protocol import Need, Operator, Rule, Stage, UnitState, UnitStats
from autocomp.testing.operator_contract import OperatorContract, assert_sound
from autocomp.testing.operator_examples import (
    USED_ROWS,
    attention,
    degenerate,
    example_state,
    example_stats,
    ffn,
)

METHODS = ["gptq", "rtn", "hqq", "awq", "awq_gptq", "smoothquant"]
STRUCTURE = {
    "heads": [1.0, 0.5, 0.25],
    "width": [1.0, 0.67, 0.34],
    "skip": True,
    "rank": [1.0, 0.6],
}
EIGHT = Rule(
    bits={"method": METHODS, "weights": ["dense", 8], "activations": [8, "static"]},
)
SPARSITY = Rule(sparsity={"method": ["magnitude"], "levels": [0.0, 0.5, 0.99, "2:4", "4:8"]})
TOKENS = Rule(tokens={"method": ["tome", "token_prune", "token_fuse"], "ratios": [0.0, 0.1, 0.25]})
FOUR = Rule(bits={"method": METHODS, "weights": [4], "activations": ["dense"], "group": 16})


CACHE = Rule(bits={"method": "gptq", "weights": ["dense"], "cache": ["dense", 8]})
VOCABULARY = Rule(structure={"vocabulary": {"keep": len(USED_ROWS), "unknown": 3}})


class TestRegistered(OperatorContract):
    @pytest.fixture(params=sorted(set(OPERATORS) - {"groups", "replace"}))
    def operator(self, request: pytest.FixtureRequest) -> Operator:
        return OPERATORS.get(request.param)

    def rules(self) -> list[Rule]:
        structure = [Rule(structure={name: choice}) for name, choice in STRUCTURE.items()]
        return [*structure, EIGHT, FOUR, VOCABULARY, SPARSITY, TOKENS, CACHE]


class TestUneven(OperatorContract):
    """Fewest bits, and one group of sites with more of them than the others."""

    @pytest.fixture(params=["gptq", "hqq", "rtn"])
    def operator(self, request: pytest.FixtureRequest) -> Operator:
        return OPERATORS.get(request.param)

    def rules(self) -> list[Rule]:
        bits = {"method": METHODS, "weights": [3, 2], "group": 16, "per_site": True}
        return [Rule(bits=bits)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("structure", "sparsity"),
    [("heads", "sparsegpt"), ("width", "sparsegpt"), ("width", "wanda"), ("rank", "magnitude")],
)
def test_structure_sparsity_and_bits_in_one_option(
    structure: str, sparsity: str, method: str
) -> None:
    """Each method, in the fewest bits it offers, behind a mask behind a structure."""
    few = [8] if method == "smoothquant" else [3, 2]
    rule = Rule(
        structure={structure: [0.5]},
        sparsity={"method": sparsity, "levels": [0.5]},
        bits={"method": method, "weights": few, "activations": [8], "group": 16},
    )
    units = {"heads": attention(kv_heads=2), "width": ffn(gated=True), "rank": ffn()}
    unit = units[structure]
    state, stats = example_state(unit), example_stats(unit)
    options = unit_options(unit, rule)
    assert [option.steps[-1]["weights"] for option in options] == few
    for option in options:
        assert [step.operator for step in option.steps] == [structure, sparsity, method]
        formats = option_formats(unit, option)
        trials = [("as it is", state, stats), *degenerate(unit, state, stats)]
        for what, given, read in trials:
            after = apply_option(unit, given, option, read)
            assert_sound(after, formats, f"{option.label()}, {what}")
            if what == "zero weights" and structure != "rank":
                assert not any(site.weight.any() for site in after.values())


class _Broken:
    """Halves the down projection, wrongly in one of several ways."""

    name, summary, paper, version = "broken", "Does it wrong.", "", 1
    stage: Stage = "structure"
    speeds_up: tuple[str, ...] = ()
    shrinks: tuple[str, ...] = ()
    saves_memory: tuple[str, ...] = ()

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.calls = 0

    def options(self, unit: Unit, rule: Rule) -> list[Step | None]:
        return [Step.of("broken")] if unit.kind == "ffn" else []

    def formats(
        self, unit: Unit, formats: dict[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        if self.fault != "hides NaN":
            return dict(formats)
        return {name: replace(form, activation_bits=8) for name, form in formats.items()}

    def needs(self, step: Step) -> frozenset[Need]:
        return frozenset()

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        self.calls += 1
        result = {name: replace(site, weight=site.weight.clone()) for name, site in state.items()}
        name = unit.sites[-1].name
        if self.fault == "in place":
            state[name].weight.mul_(0.5)
        elif self.fault == "random":
            result[name].weight += self.calls
        elif self.fault == "shape":
            result[name].weight = result[name].weight[:-1]
        elif self.fault == "nan":
            result[name].weight[0, 0] = torch.nan
        elif self.fault == "no identity":
            result[name].weight *= 0.5
        elif self.fault == "hides NaN":
            result[name].weight.nan_to_num_()
        elif self.fault == "reads":
            result[name].weight += stats[name].gram.trace() if name in stats else 0.0
        return result


@pytest.mark.parametrize(
    ("fault", "test"),
    [
        ("in place", "test_leaves_its_input_alone"),
        ("random", "test_same_input_same_weights"),
        ("shape", "test_formats_are_what_is_left"),
        ("nan", "test_formats_are_what_is_left"),
        ("no identity", "test_what_keeps_its_format_keeps_its_bits"),
        ("hides NaN", "test_what_is_no_number_does_not_become_one"),
        ("reads", "test_reads_no_more_than_it_needs"),
    ],
)
def test_contract_catches(fault: str, test: str) -> None:
    class Contract(OperatorContract):
        def rules(self) -> list[Rule]:
            return [Rule()]

    getattr(Contract(), test)(_Broken("nothing"))
    with pytest.raises(AssertionError):
        getattr(Contract(), test)(_Broken(fault))


def test_contract_wants_steps() -> None:
    class Contract(OperatorContract):
        def rules(self) -> list[Rule]:
            return [Rule()]

    with pytest.raises(AssertionError, match="offers no step"):
        Contract().test_leaves_its_input_alone(OPERATORS.get("heads"))
