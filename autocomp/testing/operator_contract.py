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

import pytest
import torch

from autocomp.core.activation_grid import static_grid
from autocomp.core.candidate import Option, Step
from autocomp.core.errors import UserError
from autocomp.core.factors import first_of, second_of
from autocomp.core.unit import Site, SiteFormat, Unit, dense_format
from autocomp.library.store import Library
from autocomp.models.codes import CODE_RANGE, group_count
from autocomp.operators.protocol import (
    STAGES,
    Operator,
    Rule,
    SiteState,
    SiteStats,
    UnitState,
    UnitStats,
)

USED_ROWS = (0, 3, 4, *range(20, 35))
"""Rows of a table that the example statistics count: what a pruned vocabulary keeps."""

INNER_ROLES = {
    "attention": (("query", "key", "value"), "output"),
    "ffn": (("gate", "up"), "down"),
}
"""Unit kind → roles that read the unit's input, role that writes its output."""


def attention(
    name: str = "layers.0.attention",
    *,
    kv_heads: int = 4,
    bias: bool = True,
    protected_tokens: int | None = None,
) -> Unit:
    """Four heads of 8 on a width of 24; of a vision model if it has protected tokens."""
    shapes = {"query": (32, 24), "key": (kv_heads * 8, 24), "value": (kv_heads * 8, 24)}
    return Unit(
        name,
        "attention",
        tuple(
            Site(f"{name}.{role}", role, *shape, bias)  # type: ignore[arg-type]
            for role, shape in {**shapes, "output": (24, 32)}.items()
        ),
        layer=0,
        heads=4,
        kv_heads=kv_heads,
        head_dim=8,
        skippable=True,
        protected_tokens=protected_tokens,
    )


def ffn(name: str = "layers.0.ffn", *, gated: bool = False, bias: bool = True) -> Unit:
    """An inner width of 96 on a width of 24."""
    roles = {**({"gate": (96, 24)} if gated else {}), "up": (96, 24), "down": (24, 96)}
    return Unit(
        name,
        "ffn",
        tuple(Site(f"{name}.{role}", role, *shape, bias) for role, shape in roles.items()),  # type: ignore[arg-type]
        layer=0,
        width=96,
        skippable=True,
    )


def embedding() -> Unit:
    """A table of 50 rows."""
    return Unit("embeddings", "embedding", (Site("table", "embedding", 50, 24, False),))


def head() -> Unit:
    """A classifier of three labels."""
    return Unit("head", "head", (Site("classifier", "head", 3, 24, True),))


def example_units() -> list[Unit]:
    """One of every kind, with and without biases, grouped queries and gates."""
    return [
        attention(protected_tokens=1),
        attention("layers.1.attention", kv_heads=2, bias=False),
        ffn(),
        ffn("layers.1.ffn", gated=True, bias=False),
        embedding(),
        head(),
    ]


def example_state(unit: Unit, seed: int = 0) -> UnitState:
    """Random dense weights."""
    generator = torch.Generator().manual_seed(seed)
    formats = dense_format(unit)
    return {
        site.name: SiteState(
            weight=torch.randn(site.rows, site.columns, generator=generator),
            bias=torch.randn(site.rows, generator=generator) if site.bias else None,
            format=formats[site.name],
        )
        for site in unit.sites
    }


def example_stats(unit: Unit, tokens: int = 400, seed: int = 1) -> UnitStats:
    """Statistics of correlated random inputs with a mean; equal inputs are shared.

    Of a table, `USED_ROWS` are counted, however many the tokens.
    """
    if unit.kind == "embedding":
        nothing = torch.empty(0)
        seen = torch.zeros(unit.sites[0].rows, dtype=torch.int64)
        seen[list(USED_ROWS)] = torch.arange(1, len(USED_ROWS) + 1)
        rows = SiteStats(nothing.reshape(0, 0), nothing, int(seen.sum()), seen)
        return {unit.sites[0].name: rows}
    generator = torch.Generator().manual_seed(seed)
    shared: dict[int, SiteStats] = {}
    stats: dict[str, SiteStats] = {}
    for site in unit.sites:
        columns = site.columns
        entry = shared.get(columns)
        if entry is None:
            mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
            inputs = torch.randn(tokens, columns, generator=generator) @ mixing
            inputs = inputs + torch.randn(columns, generator=generator)
            low, high = torch.aminmax(inputs, dim=0)
            entry = SiteStats(
                inputs.t() @ inputs,
                inputs.mean(dim=0),
                tokens,
                low=low,
                high=high,
                sample=inputs[:64].clone(),
            )
            shared[columns] = entry
        stats[site.name] = entry
    return stats


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
            self._assert_sound(
                operator.apply(case.unit, case.state, case.step, case.stats), formats, str(case)
            )

    def _assert_sound(self, state: UnitState, formats: dict[str, SiteFormat], what: str) -> None:
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
        """Dead inputs, a single calibration token, no input at all, zero weights: still sound."""
        for case in self._cases(operator):
            formats = operator.formats(case.unit, dense_format(case.unit), case.step)
            zero = {
                name: replace(site, weight=torch.zeros_like(site.weight))
                for name, site in case.state.items()
            }
            one_token = example_stats(case.unit, tokens=1)
            no_input = {name: _masked(s, slice(None)) for name, s in case.stats.items()}
            trials = [
                (case.state, one_token, "one token"),
                (case.state, no_input, "no input"),
                (case.state, _with_dead_columns(case.stats), "dead inputs"),
                (zero, case.stats, "zero weights"),
            ]
            for state, stats, what in trials:
                after = operator.apply(case.unit, state, case.step, stats)
                self._assert_sound(after, formats, f"{case}, {what}")


def _shape(formats: dict[str, SiteFormat], site: Site) -> tuple[int, int]:
    """Rows and columns of what stands at a site, one layer or two factors."""
    if site.name in formats:
        form = formats[site.name]
        return form.rows, form.columns
    first, second = formats[first_of(site.name)], formats[second_of(site.name)]
    assert second.columns == (first.columns if site.table else first.rows), site.name
    return (first.rows, second.rows) if site.table else (second.rows, first.columns)


def _with_dead_columns(stats: UnitStats) -> UnitStats:
    return {name: _masked(site, slice(None, None, 3)) for name, site in stats.items()}


def _masked(stats: SiteStats, columns: slice) -> SiteStats:
    """The statistics with these columns of the input zero; every site's tensors are its own."""
    gram = stats.gram.clone()
    gram[columns], gram[:, columns] = 0.0, 0.0
    parts = {}
    for part in ("mean", "low", "high", "sample"):
        value = getattr(stats, part)
        if value is not None:
            parts[part] = value.clone()
            parts[part][..., columns] = 0.0
    return replace(stats, gram=gram, **parts)
