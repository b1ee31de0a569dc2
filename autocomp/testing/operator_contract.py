"""The contract of an operator, as tests. Needs pytest and torch.

    from autocomp.testing.operator_contract import OperatorContract

    class TestMyOperator(OperatorContract):
        @pytest.fixture
        def operator(self):
            return MyOperator()

        def rules(self):
            return [Rule(structure={"mine": [1.0, 0.5]})]

Every test runs over the example units below and every step the operator offers for them under
`rules()`; a rule that the operator refuses at some unit (UserError) is no rule for that unit.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autocomp.core.activation_grid import static_grid
from autocomp.core.candidate import Option, Step
from autocomp.core.errors import AutocompError, UserError
from autocomp.core.factors import first_of, second_of
from autocomp.core.unit import Site, SiteFormat, Unit, dense_format
from autocomp.library.store import Library
from autocomp.models.codes import CODE_RANGE, group_count
from autocomp.operators.protocol import (
    STAGES,
    Operator,
    Rule,
    SiteStats,
    UnitState,
    UnitStats,
)
from autocomp.testing.operator_examples import (
    degenerate,
    example_state,
    example_stats,
    example_units,
    without,
)

__all__ = ["OperatorContract", "assert_same", "assert_sound"]

INNER_ROLES = {
    "attention": (("query", "key", "value"), "output"),
    "ffn": (("gate", "up"), "down"),
}
"""Unit kind → roles that read the unit's input, role that writes its output."""


@dataclass
class _Case:
    unit: Unit
    state: UnitState
    stats: UnitStats
    step: Step

    def __str__(self) -> str:
        return f"{self.step.label()} at {self.unit.name}"


def _tensors(state: UnitState) -> dict[str, torch.Tensor]:
    parts: tuple[str, ...] = ("weight", "bias", "codes", "scales", "input_scale", "mask")
    parts += ("kept_columns", "kept_rows", "row_of", "output_scale")
    tensors = {
        f"{name}.{part}": getattr(site, part)
        for name, site in state.items()
        for part in parts
        if getattr(site, part) is not None
    }
    for name, site in state.items():
        if site.mixer is not None:
            held = site.mixer.parameters.items()
            tensors |= {f"{name}.mixer.{part}": tensor for part, tensor in held}
    return tensors


def assert_same(one: UnitState, other: UnitState, what: str) -> None:
    """Equal formats and bit-equal tensors."""
    assert {n: s.format for n, s in one.items()} == {n: s.format for n, s in other.items()}, what
    ranges = [{name: site.input_range for name, site in state.items()} for state in (one, other)]
    assert ranges[0] == ranges[1], what
    mixers = [
        {name: (site.mixer.name, site.mixer.shape) for name, site in state.items() if site.mixer}
        for state in (one, other)
    ]
    assert mixers[0] == mixers[1], what
    left, right = _tensors(one), _tensors(other)
    assert left.keys() == right.keys(), what
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), f"{what}: {name} differs"


def assert_sound(state: UnitState, formats: dict[str, SiteFormat], what: str) -> None:
    """The state is what its formats say: shapes, codes, masks, scales above zero, all finite."""
    assert {name: site.format for name, site in state.items()} == formats, what
    for name, site in state.items():
        form = site.format
        assert tuple(site.weight.shape) == (form.rows, form.columns), f"{what}: {name}"
        assert site.weight.dtype == torch.float32
        assert torch.isfinite(site.weight).all(), f"{what}: {name}"
        assert (site.bias is not None) == form.bias, f"{what}: {name}"
        if site.bias is not None:
            assert tuple(site.bias.shape) == (form.rows,), f"{what}: {name}"
            assert torch.isfinite(site.bias).all(), f"{what}: {name}"
        assert (None if site.mixer is None else site.mixer.name) == form.mixer, what
        assert (site.mask is None) == (form.nonzeros is None), f"{what}: {name}"
        if site.mask is not None:
            assert site.mask.dtype == torch.bool
            assert int(site.mask.sum()) == form.nonzeros, f"{what}: {name}"
            assert not site.weight[~site.mask].any(), f"{what}: {name} is not zero off its mask"
        assert (site.codes is None) == (form.weight_bits == 32), f"{what}: {name}"
        assert (site.input_scale is not None) == form.scaled, f"{what}: {name}"
        if site.input_scale is not None:
            assert tuple(site.input_scale.shape) == (form.columns,), f"{what}: {name}"
            assert site.input_scale.dtype == torch.float32
            assert torch.isfinite(site.input_scale).all(), f"{what}: {name}"
            assert (site.input_scale > 0).all(), f"{what}: {name}"
        assert (site.output_scale is not None) == (form.cache_bits == 8), f"{what}: {name}"
        if site.output_scale is not None:
            assert tuple(site.output_scale.shape) == (form.rows,), f"{what}: {name}"
            assert torch.isfinite(site.output_scale).all(), f"{what}: {name}"
            assert (site.output_scale > 0).all(), f"{what}: {name}"
        assert (site.input_range is not None) == form.static, f"{what}: {name}"
        if site.input_range is not None:
            scale, zero_point = static_grid(*site.input_range)
            assert scale > 0
            assert 0 <= zero_point <= 255
        if site.codes is not None:
            assert site.scales is not None
            low, high = CODE_RANGE[form.weight_bits]
            assert site.codes.dtype == torch.int8
            assert low <= int(site.codes.min()) <= int(site.codes.max()) <= high
            assert tuple(site.scales.shape) == (form.rows, group_count(form))
            assert torch.isfinite(site.scales).all()
            assert (site.scales > 0).all(), f"{what}: {name}: scales must be above zero"
            group = form.group or form.columns
            steps = site.scales.repeat_interleave(group, dim=1)[:, : form.columns]
            assert torch.equal(site.weight, site.codes.float() * steps), f"{what}: {name}"


class OperatorContract:
    """Subclass, supply the fixture `operator`, and `rules` that make it offer steps."""

    @pytest.fixture
    def operator(self) -> Operator:
        """The operator under test."""
        raise NotImplementedError("supply a fixture named operator")

    def rules(self) -> list[Rule]:
        """Rules under which the operator offers its steps."""
        raise NotImplementedError("supply rules under which the operator offers steps")

    def units(self) -> list[Unit]:
        """The units it is tried on."""
        return example_units()

    def state(self, unit: Unit) -> UnitState:
        """What the operator starts from."""
        return example_state(unit)

    def stats(self, unit: Unit) -> UnitStats:
        """What it reads."""
        return example_stats(unit)

    def _cases(self, operator: Operator) -> Iterator[_Case]:
        found = False
        for unit in self.units():
            steps: dict[Step, None] = {}
            for rule in self.rules():
                try:
                    offered = operator.options(unit, rule)
                except UserError:
                    continue
                steps.update((step, None) for step in offered if step is not None)
            for step in steps:
                found = True
                yield _Case(unit, self.state(unit), self.stats(unit), step)
        assert found, f"{operator.name} offers no step at any example unit: supply other rules"

    def test_says_what_it_is(self, operator: Operator) -> None:
        """Name, summary, stage and version are there."""
        assert operator.name.isidentifier()
        assert operator.summary.endswith(".")
        assert operator.stage in STAGES
        assert operator.version >= 1

    def test_options_are_its_own_and_unique(self, operator: Operator) -> None:
        """The same list every time, no step twice, every step under the operator's name."""
        for unit in self.units():
            for rule in self.rules():
                try:
                    offered = list(operator.options(unit, rule))
                except UserError:
                    continue
                assert offered == list(operator.options(unit, rule))
                assert len(set(offered)) == len(offered)
                assert all(step is None or step.operator == operator.name for step in offered)

    def test_needs_no_torch_to_be_listed(self, operator: Operator) -> None:
        """Importing the module that defines it does not import torch."""
        module = type(operator).__module__
        code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_leaves_its_input_alone(self, operator: Operator) -> None:
        """`apply` does not modify the state or the statistics."""
        for case in self._cases(operator):
            state = copy.deepcopy(case.state)
            grams = {name: site.gram.clone() for name, site in case.stats.items()}
            operator.apply(case.unit, case.state, case.step, case.stats)
            assert_same(case.state, state, f"{case} modified its input")
            for name, gram in grams.items():
                assert torch.equal(case.stats[name].gram, gram), f"{case} modified statistics"

    def test_same_input_same_weights(self, operator: Operator) -> None:
        """Bit for bit, whether or not something was computed from the same statistics before."""
        for case in self._cases(operator):
            first = operator.apply(case.unit, case.state, case.step, case.stats)
            again = operator.apply(case.unit, case.state, case.step, case.stats)
            assert_same(first, again, f"{case} applied twice")
            fresh = operator.apply(
                case.unit, self.state(case.unit), case.step, self.stats(case.unit)
            )
            assert_same(first, fresh, f"{case} applied afresh")

    def test_formats_are_what_is_left(self, operator: Operator) -> None:
        """`formats` agrees with the tensors `apply` leaves, codes and scales included."""
        for case in self._cases(operator):
            formats = operator.formats(case.unit, dense_format(case.unit), case.step)
            assert_sound(
                operator.apply(case.unit, case.state, case.step, case.stats), formats, str(case)
            )

    def test_boundary_keeps_its_shape(self, operator: Operator) -> None:
        """What the unit reads and what it writes keep their width, unless it is skipped.

        A table may lose rows: `kept_rows` then says which are left.
        """
        for case in self._cases(operator):
            formats = operator.formats(case.unit, dense_format(case.unit), case.step)
            if not formats:
                assert case.unit.skippable, f"{case}: the unit cannot be skipped"
                continue
            readers, writer = INNER_ROLES.get(case.unit.kind, ((), ""))
            for site in case.unit.sites:
                mixed = any(form.mixer for form in formats.values())
                if mixed and site.role in readers and site.name not in formats:
                    continue  # a projection that the mixer does not read
                rows, columns = _shape(formats, site)
                if site.role in readers or not readers:
                    assert columns == site.columns, f"{case}: {site.name}"
                if site.table:
                    assert rows <= site.rows, f"{case}: {site.name}"
                elif site.role == writer or not readers:
                    assert rows == site.rows, f"{case}: {site.name}"

    def test_saved_and_loaded_it_is_the_same(self, operator: Operator, tmp_path: Path) -> None:
        """The library gives back the bits it was given."""
        library = Library(tmp_path)
        for number, case in enumerate(self._cases(operator)):
            state = operator.apply(case.unit, case.state, case.step, case.stats)
            if not state:
                continue
            key = f"{number:040d}"
            library.put(key, state, {"option": Option((case.step,)).to_json()})
            loaded = library.get(key)
            assert loaded is not None
            assert_same(state, loaded, f"{case} through the library")

    def test_degenerate_inputs(self, operator: Operator) -> None:
        """Dead inputs, few calibration tokens, one, none at all, zero weights: still sound."""
        for case in self._cases(operator):
            formats = operator.formats(case.unit, dense_format(case.unit), case.step)
            for what, state, stats in degenerate(case.unit, case.state, case.stats):
                after = operator.apply(case.unit, state, case.step, stats)
                assert_sound(after, formats, f"{case}, {what}")

    def test_what_keeps_its_format_keeps_its_bits(self, operator: Operator) -> None:
        """A site the step leaves in its format is left alone: a step that is none changes nothing.

        So is every site where the operator is left out, which `None` among the options stands for.
        One that trains moves whatever it inherits.
        """
        if getattr(operator, "trains", False):
            return
        for case in self._cases(operator):
            before = dense_format(case.unit)
            formats = operator.formats(case.unit, before, case.step)
            after = operator.apply(case.unit, case.state, case.step, case.stats)
            same = [name for name, form in formats.items() if form == before.get(name)]
            kept = {name: after[name] for name in same}
            assert_same(kept, {name: case.state[name] for name in same}, f"{case} left alone")

    def test_reads_no_more_than_it_needs(self, operator: Operator) -> None:
        """Statistics with what `needs` names and nothing else give the same bits."""
        for case in self._cases(operator):
            needs = operator.needs(case.step)
            assert needs <= {"gram", "range", "rows", "recording"}, f"{case} needs {set(needs)}"
            stats = without(case.stats, needs) if needs else {}
            whole = operator.apply(case.unit, case.state, case.step, case.stats)
            less = operator.apply(case.unit, case.state, case.step, stats)
            assert_same(whole, less, f"{case} with {sorted(needs)} alone")

    def test_what_is_no_number_does_not_become_one(self, operator: Operator) -> None:
        """NaN weights or statistics are refused, or are there to be seen in what is left."""
        for case in self._cases(operator):
            formats = operator.formats(case.unit, dense_format(case.unit), case.step)
            for name, site in case.state.items():
                if formats and formats.get(name) == site.format:
                    continue  # left alone
                broken = replace(site, weight=torch.full_like(site.weight, torch.nan))
                state = {**case.state, name: broken}
                _assert_shows(operator, case, state, case.stats, f"{name} is NaN")
            gathered = any(site.has_gram for site in case.stats.values())
            if gathered and operator.needs(case.step) & {"gram", "range"}:
                stats = {name: _not_finite(site) for name, site in case.stats.items()}
                _assert_shows(operator, case, case.state, stats, "statistics are NaN")


def _assert_shows(
    operator: Operator, case: _Case, state: UnitState, stats: UnitStats, what: str
) -> None:
    try:
        after = operator.apply(case.unit, state, case.step, stats)
    except (AutocompError, ArithmeticError, RuntimeError):
        return
    seen = list(_tensors(after).values())
    seen += [torch.tensor(site.input_range) for site in after.values() if site.input_range]
    if not after or not all(bool(torch.isfinite(tensor).all()) for tensor in seen):
        return
    clean = operator.apply(case.unit, case.state, case.step, case.stats)
    assert_same(
        after, clean, f"{case}: {what}, and it made numbers of it, not having left it alone"
    )


def _not_finite(stats: SiteStats) -> SiteStats:
    parts: dict[str, Any] = {
        part: torch.full_like(value, torch.nan)
        for part in ("gram", "mean", "low", "high", "sample")
        if (value := getattr(stats, part)) is not None
    }
    return replace(stats, **parts)


def _shape(formats: dict[str, SiteFormat], site: Site) -> tuple[int, int]:
    """Rows and columns of what stands at a site, one layer or two factors."""
    if site.name in formats:
        form = formats[site.name]
        return form.rows, form.columns
    first, second = formats[first_of(site.name)], formats[second_of(site.name)]
    assert second.columns == (first.columns if site.table else first.rows), site.name
    return (first.rows, second.rows) if site.table else (second.rows, first.columns)
