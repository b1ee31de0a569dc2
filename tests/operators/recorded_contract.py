"""The public contract on a unit whose attention was recorded: for operators that train."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from replaced_examples import Case

from autocomp.core.candidate import Step
from autocomp.core.unit import Unit, dense_format
from autocomp.operators.protocol import Operator, UnitState, UnitStats
from autocomp.operators.replace import distil
from autocomp.operators.replace.distil import Settings
from autocomp.testing.operator_contract import OperatorContract, assert_sound


class RecordedContract(OperatorContract):
    """The contract of an operator that trains: on a recorded unit, the fixture `made`, and briefly.

    Degenerate inputs are those of the recording; `steps` are what is tried on them.
    """

    steps: tuple[Step, ...] = ()

    @pytest.fixture(autouse=True)
    def _made(self, made: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = made
        brief = Settings(steps=3, warm_up=5, trial_steps=1, check_every=10)
        monkeypatch.setattr(distil, "SETTINGS", brief)

    def units(self) -> list[Unit]:
        return [self.made.unit]

    def state(self, unit: Unit) -> UnitState:
        return {
            name: replace(
                site,
                weight=site.weight.clone(),
                bias=None if site.bias is None else site.bias.clone(),
            )
            for name, site in self.made.state.items()
        }

    def stats(self, unit: Unit) -> UnitStats:
        return self.made.stats

    def test_degenerate_inputs(self, operator: Operator) -> None:
        assert self.steps
        zero = {
            name: replace(site, weight=torch.zeros_like(site.weight))
            for name, site in self.made.state.items()
        }
        for step in self.steps:
            after = operator.apply(self.made.unit, zero, step, self.made.stats)
            formats = operator.formats(self.made.unit, dense_format(self.made.unit), step)
            assert_sound(after, formats, step.label())
