"""The trial proposer: order, distinctness, budget, adaptation, resumption; and the baselines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from optuna.trial import TrialState
from search_problems import (
    LEVELS,
    Problem,
    TablePredictor,
    attention,
    embeddings,
    ffn,
    problem,
)

from autocomp.core.budget import Budget
from autocomp.core.candidate import Candidate, Distillation, Option, Step
from autocomp.core.errors import InternalError
from autocomp.core.measurement import Measurement
from autocomp.search.baselines import baselines
from autocomp.search.proposal import Proposal
from autocomp.search.proposer import TrialProposer
from autocomp.search.screening import Screened, screen
from autocomp.search.settings import Settings
from autocomp.search.space import Space, hamming
from autocomp.spec.schema import DistilSection, FloatRange
from autocomp.study.records import TrialRecord

BUDGET = Budget(latency_ms=3.0, size_bytes=150e3)
DISTIL = DistilSection(
    lr=FloatRange(low=1e-4, high=6e-4, log=True), temperature=[1, 2, 4], tokens=[40000, 80000]
)


def _setup(seed: int = 1) -> tuple[Problem, list[Screened]]:
    p = problem(seed=seed, distill=DISTIL)
    found = screen(p.space, p.predictor, p.evaluate, BUDGET, 60, 0, scores=p.scores)
    return p, found


@pytest.fixture(scope="module")
def screened() -> tuple[Problem, list[Screened]]:
    return _setup()


def _proposer(
    setup: tuple[Problem, Sequence[Screened]], trials: int = 10, **changes: object
) -> TrialProposer:
    p, found = setup
    arguments: dict[str, object] = {"scores": p.scores, "trials": trials, "seed": 0, **changes}
    return TrialProposer(p.space, found, {None: p.predictor}, BUDGET, **arguments)  # type: ignore[arg-type]


def _record(p: Problem, proposal: Proposal, slow: float = 1.0, **changes: object) -> TrialRecord:
    """What a trial would report: quality falls with the true KL, latency is `slow` × predicted."""
    estimated = p.predictor.predict(proposal.candidate.by_unit)
    assert estimated.latency_ms is not None
    fields: dict[str, object] = {
        "quality": math.exp(-p.truth(p.space.encode(proposal.candidate))),
        "measured": Measurement("measured", estimated.latency_ms * slow, estimated.size_bytes),
        "estimated": proposal.estimated,
        **changes,
    }
    return TrialRecord(
        proposal.id, proposal.kind, proposal.proposed_by, "complete", proposal.candidate, **fields
    )  # type: ignore[arg-type]


def _run(p: Problem, proposer: TrialProposer, **changes: object) -> list[Proposal]:
    proposals: list[Proposal] = []
    while (proposal := proposer.ask()) is not None:
        proposals.append(proposal)
        proposer.tell(proposal.id, _record(p, proposal, **changes))
    return proposals


def test_proposals_are_distinct_within_the_budget_and_as_many_as_asked(
    screened: tuple[Problem, list[Screened]],
) -> None:
    p, found = screened
    proposals = _run(p, _proposer(screened, 12))
    assert len({proposal.id for proposal in proposals}) == len(proposals) == 12
    for proposal in proposals:
        assert proposal.estimated is not None
        assert proposal.estimated.latency_ms is not None
        assert proposal.estimated.latency_ms <= 0.99 * 3.0
        assert (proposal.estimated.size_bytes or 0) <= 0.99 * 150e3
        assert proposal.candidate.distillation.tokens in (40000, 80000)
        assert 1e-4 <= proposal.candidate.distillation.lr <= 6e-4
        assert proposal.proposed_by in ("milp", "evolution", "surrogate", "random", "gain", "front")
    fitting = [i for i in found if i.estimated and (i.estimated.latency_ms or 9) <= 2.97]
    best = min(
        (i for i in fitting if i.estimated and (i.estimated.size_bytes or 9e9) <= 148.5e3),
        key=lambda item: item.kl or 0.0,
    )
    assert proposals[0].candidate.stitch_key == best.key


def test_no_trials_are_the_baselines_alone(screened: tuple[Problem, list[Screened]]) -> None:
    p, _ = screened
    candidate = Candidate.of({unit.name: Option() for unit in p.space.units})
    proposer = _proposer(screened, 0, baselines=[("dense", "dense", candidate)])
    assert [proposal.id for proposal in _run(p, proposer)] == ["dense"]


def test_parallel_asks_never_duplicate(screened: tuple[Problem, list[Screened]]) -> None:
    proposer = _proposer(screened, 30)
    asked = [proposer.ask() for _ in range(30)]
    assert proposer.ask() is None
    assert len({proposal.candidate.key for proposal in asked if proposal}) == 30
    assert len(proposer.in_flight) == 30
    vectors = [screened[0].space.encode(proposal.candidate) for proposal in asked if proposal]
    assert len(set(vectors[:4])) == 4
    assert min(hamming(vectors[0], other) for other in vectors[1:4]) >= 1


def test_it_adapts_after_three_feasible_trials(screened: tuple[Problem, list[Screened]]) -> None:
    p, _ = screened
    proposer = _proposer(screened, 16)
    proposals = _run(p, proposer)
    records = {proposal.id: _record(p, proposal) for proposal in proposals}
    early, late = proposals[:3], proposals[3:]
    assert len({proposal.candidate.distillation for proposal in early}) == 3
    assert all(proposal.candidate.distillation.tokens == 80000 for proposal in early)
    vectors = [p.space.encode(proposal.candidate) for proposal in proposals]
    assert len(set(vectors)) < len(vectors), "the best architecture is tried under other settings"
    repeated = [v for i, v in enumerate(vectors) if v in vectors[:i]]
    qualities = sorted((records[x.id].quality or 0.0 for x in proposals), reverse=True)
    assert any(math.exp(-p.truth(v)) == pytest.approx(qualities[0]) for v in repeated)
    assert len({proposal.candidate.distillation.lr for proposal in late}) > 4


def test_what_the_machine_failed_is_proposed_again_first_and_once(
    screened: tuple[Problem, list[Screened]],
) -> None:
    p, _ = screened
    earlier = _run(p, _proposer(screened, 5))
    finished = [_record(p, proposal) for proposal in earlier[:3]]
    again = [
        TrialRecord(x.id, x.kind, x.proposed_by, "failed", x.candidate, by_machine=True)
        for x in earlier[3:]
    ]
    resumed = _run(p, _proposer(screened, 7, finished=finished, again=again))
    assert [(x.id, x.candidate, x.proposed_by) for x in resumed[:2]] == [
        (x.id, x.candidate, x.proposed_by) for x in earlier[3:]
    ]
    assert len(resumed) == 4, "they are of the seven in all"
    assert len({x.id for x in [*earlier[:3], *resumed]}) == 7


def test_it_learns_what_training_makes_of_a_shape() -> None:
    """Screening says that level 1 is better than level 3 everywhere; after training it is not."""
    p = problem(seed=1, distill=DISTIL)
    vectors = list(itertools.product((1, 3), repeat=7))
    screened = [Screened(p.space.decode(v), 0.1 + 0.01 * v.count(3), "milp") for v in vectors]
    proposer = TrialProposer(
        p.space, screened, {None: p.predictor}, Budget(), scores=p.scores, trials=24, seed=0
    )
    narrow: list[int] = []
    origins: list[str] = []
    while (proposal := proposer.ask()) is not None:
        vector = p.space.encode(proposal.candidate)
        narrow.append(vector.count(3))
        origins.append(proposal.proposed_by)
        kl = 0.5 - 0.05 * vector.count(3)
        proposer.tell(proposal.id, _record(p, proposal, quality=1 - kl, teacher_kl=kl))
    assert narrow[0] == 0
    assert max(narrow[6:]) == 7
    assert set(origins[:6]) == {"milp"}
    assert set(origins[6:]) == {"gain", "milp"}, "milp: the best again, trained otherwise"


def test_regular_shapes_have_every_second_of_the_first_trials(
    screened: tuple[Problem, list[Screened]],
) -> None:
    p, found = screened
    shapes = [item for item in found if item.kl is not None][20:30]
    marked = [replace(item, proposed_by="regular") if item in shapes else item for item in found]
    proposer = _proposer((p, marked), 24)
    proposals = _run(p, proposer, teacher_kl=None)
    origins = [proposal.proposed_by for proposal in proposals]
    assert origins[0] != "regular"
    assert origins[1:6:2] == ["regular"] * 3


def test_the_margin_grows_when_measured_models_miss_and_shrinks_after_a_refit(
    screened: tuple[Problem, list[Screened]],
) -> None:
    p, _ = screened
    proposer = _proposer(screened, 20)
    assert proposer.margins() == pytest.approx({"latency_ms": 0.01, "size_bytes": 0.01})
    first = proposer.ask()
    assert first is not None
    proposer.tell(first.id, _record(p, first, measured=Measurement("measured", 3.3, 1)))
    assert first.estimated is not None
    over = 3.3 / (first.estimated.latency_ms or 0.0)
    assert over > 1.1
    assert proposer.margins()["latency_ms"] == pytest.approx(1 - 0.99 / over)
    assert proposer.margins()["size_bytes"] == pytest.approx(0.01)
    second = proposer.ask()
    assert second is not None
    assert second.estimated is not None
    assert (second.estimated.latency_ms or 9) * over <= 2.97 + 1e-9
    refitted = _scaled(p.predictor, 3.3 / (first.estimated.latency_ms or 1.0))
    proposer.correct(refitted)
    assert proposer.margins()["latency_ms"] == pytest.approx(0.01)
    third = proposer.ask()
    assert third is not None
    assert third.estimated is not None
    assert (third.estimated.latency_ms or 9) <= 2.97


def _scaled(predictor: TablePredictor, scale: float) -> TablePredictor:
    return TablePredictor(
        predictor._latency, predictor._size, predictor.base_latency_ms, predictor.base_size_bytes,
        scale,
    )  # fmt: skip


def test_new_candidates_are_made_when_the_screened_ones_no_longer_fit(
    screened: tuple[Problem, list[Screened]],
) -> None:
    p, found = screened
    slower = _scaled(p.predictor, 1.6)
    limit = Budget(latency_ms=3.0, size_bytes=150e3)
    outside = [
        item for item in found if (slower.predict(item.candidate.by_unit).latency_ms or 0) > 2.97
    ]
    assert outside
    proposer = TrialProposer(
        p.space, outside, {None: slower}, limit, scores=p.scores, trials=6, seed=0
    )
    proposals = [proposer.ask() for _ in range(6)]
    known = {item.key for item in outside}
    for proposal in proposals:
        assert proposal is not None
        assert proposal.candidate.stitch_key not in known
        assert proposal.estimated is not None
        assert limit.feasible(proposal.estimated)


def test_nothing_fits_nothing_is_proposed(screened: tuple[Problem, list[Screened]]) -> None:
    proposer = _proposer(screened)
    proposer.correct(_scaled(screened[0].predictor, 100.0))
    assert proposer.ask() is None


def test_failures_are_told_as_failed_and_the_rest_goes_on(
    screened: tuple[Problem, list[Screened]],
) -> None:
    p, _ = screened
    proposer = _proposer(screened, 5)
    outcomes: list[TrialRecord | str] = []
    for index in range(5):
        proposal = proposer.ask()
        assert proposal is not None
        outcome: TrialRecord | str = _record(p, proposal)
        if index == 0:
            outcome = "ValueError: broken"
        elif index == 1:
            outcome = _record(p, proposal, quality=math.nan)
        elif index == 2:
            outcome = _record(p, proposal, measured=None)
        outcomes.append(outcome)
        proposer.tell(proposal.id, outcome)
    states = [trial.state for trial in proposer.study.trials]
    assert states == [TrialState.FAIL] * 3 + [TrialState.COMPLETE] * 2
    assert proposer.study.trials[0].user_attrs["error"] == "ValueError: broken"
    assert all(len(trial.constraints) == 2 for trial in proposer.study.trials)
    with pytest.raises(InternalError, match="was not asked"):
        proposer.tell("unknown", "x")


def test_constraints_and_values_are_in_the_optuna_study(
    screened: tuple[Problem, list[Screened]],
) -> None:
    p, _ = screened
    proposer = _proposer(screened, 2)
    for slow in (1.0, 2.0):
        proposal = proposer.ask()
        assert proposal is not None
        proposer.tell(proposal.id, _record(p, proposal, slow=slow))
    good, bad = proposer.study.trials
    assert good.constraints["latency_ms"] <= 0 < bad.constraints["latency_ms"]
    assert len(good.values) == 3
    assert good.values[0] > 0
    assert set(p.space.names) < set(good.params)
    assert good.params["distil.tokens"] == 80000


def test_a_search_resumes_from_its_records(screened: tuple[Problem, list[Screened]]) -> None:
    p, _ = screened
    first = _proposer(screened, 8)
    records = []
    for _ in range(5):
        proposal = first.ask()
        assert proposal is not None
        records.append(_record(p, proposal))
        first.tell(proposal.id, records[-1])
    lost = first.ask()  # in flight when the driver died
    assert lost is not None
    records.append(
        TrialRecord("0123456789", "search", "milp", "failed", p.space.decode([1] * 7), error="x")
    )
    back = [TrialRecord.from_json(record.to_json()) for record in records]
    second = _proposer(screened, 8, finished=back)
    assert len(second.study.trials) == 6
    assert [t.state for t in second.study.trials].count(TrialState.FAIL) == 1
    more = _run(p, second)
    assert len(more) == 2
    assert not {proposal.id for proposal in more} & {record.id for record in records}
    assert _proposer(screened, 6, finished=back).ask() is None
    extended = _proposer(screened, 6, finished=back)
    extended.extend(1)
    assert extended.ask() is not None


def test_baselines_go_first_once_and_do_not_count(
    screened: tuple[Problem, list[Screened]],
) -> None:
    p, _ = screened
    given = baselines(p.space, p.space.units)
    proposer = _proposer(screened, 3, baselines=given)
    proposals = _run(p, proposer)
    names = [name for name, _, _ in given]
    assert [proposal.id for proposal in proposals[: len(given)]] == names
    assert len(proposals) == len(given) + 3
    assert len(proposer.study.trials) == len(proposals)
    dense = _record(p, proposals[0])
    resumed = _proposer(screened, 3, baselines=given, finished=[dense])
    following = resumed.ask()
    assert following is not None
    assert following.id == names[1]


def test_baselines_are_what_the_space_offers_and_nothing_else() -> None:
    def bits(weights: int, activations: int, method: str = "gptq") -> Option:
        return Option((Step.of(method, weights=weights, activations=activations, group=0),))

    heads = [Option((Step.of("heads", keep=keep),)) for keep in (3, 2)]
    widths = [Option((Step.of("width", keep=keep),)) for keep in (96, 64, 32)]
    both = Option((*widths[1].steps, *bits(8, 8).steps))
    shared = [Option(), bits(8, 32), bits(8, 8), bits(4, 32)]
    units = [embeddings(), attention(0), ffn(0), ffn(1)]
    space = Space(
        units,
        {
            "embeddings": [Option(), bits(8, 32, "rtn")],
            "layers.0.attention": [*shared, *heads],
            "layers.0.ffn": [*shared, *widths, both, Option((Step.of("skip"),))],
        },
    )
    trained = Distillation(tokens=1000)
    found = {name: (kind, c) for name, kind, c in baselines(space, units, trained)}
    assert list(found) == [
        "dense",
        "uniform-int8",
        "uniform-int4",
        "uniform-width-0.75",
        "uniform-width-0.5",
        "uniform-width-0.25",
    ]
    assert found["dense"][0] == "dense"
    assert found["dense"][1].distillation.tokens == 0
    assert all(option.dense for _, option in found["dense"][1])
    kind, int8 = found["uniform-int8"]
    assert kind == "uniform"
    assert int8.distillation.tokens == 0
    assert int8["layers.0.ffn"] == int8["layers.0.attention"] == bits(8, 8)
    assert int8["embeddings"] == bits(8, 32, "rtn")
    assert int8["layers.1.ffn"].dense
    int4 = found["uniform-int4"][1]
    assert int4["embeddings"] == bits(8, 32, "rtn")  # 4 bits are not offered there
    assert int4["layers.0.ffn"] == bits(4, 32)
    quarter = found["uniform-width-0.25"][1]
    assert quarter.distillation == trained
    assert quarter["layers.0.attention"].dense
    assert quarter["layers.0.ffn"] == widths[2]
    assert found["uniform-width-0.75"][1]["layers.0.attention"] == heads[0]


def test_a_space_without_choices_has_only_the_dense_baseline() -> None:
    units = [ffn(0)]
    assert [name for name, _, _ in baselines(Space(units, {}), units)] == ["dense"]
    only_skip = Space(units, {"layers.0.ffn": [LEVELS[0], LEVELS[4]]})
    assert [name for name, _, _ in baselines(only_skip, units)] == ["dense"]


def test_untrained_spaces_propose_each_architecture_once() -> None:
    p = problem(units=2, distill=DistilSection(tokens=[0]))
    budget = Budget(size_bytes=150e3)
    found = screen(p.space, p.predictor, p.evaluate, budget, 100, 0, scores=p.scores)
    proposer = TrialProposer(
        p.space, found, {None: p.predictor}, budget, scores=p.scores, trials=100, margin=0.0
    )
    proposals = _run(p, proposer)
    assert all(proposal.candidate.distillation == Distillation() for proposal in proposals)
    assert len({proposal.candidate.stitch_key for proposal in proposals}) == len(proposals)
    assert len(proposals) >= len(found)


def test_settings_spread_covers_the_range_and_near_stays_inside() -> None:
    import numpy as np

    settings = Settings(DISTIL)
    spread = [settings.spread(index) for index in range(7)]
    rates = sorted(each.lr for each in spread)
    assert spread[0].lr == pytest.approx(math.sqrt(1e-4 * 6e-4), rel=0.01)
    steps = np.diff(np.log(rates))
    assert steps.max() / steps.min() < 1.1
    rng = np.random.default_rng(0)
    near = [settings.near(spread[0], rng) for _ in range(200)]
    assert all(settings.holds(each) for each in near)
    factors = np.log([each.lr / spread[0].lr for each in near])
    assert abs(float(factors.mean())) < 0.1
    assert 0.25 < float(factors.std()) < 0.5
    assert {each.tokens for each in near} == {40000, 80000}
    assert not settings.holds(Distillation(tokens=5, lr=2e-4))


def test_candidate_outside_the_space_is_still_told(
    screened: tuple[Problem, list[Screened]],
) -> None:
    p, _ = screened
    stranger = Candidate.of({name: Option((Step.of("new"),)) for name in p.space.names})
    record = TrialRecord("old", "search", "milp", "complete", stranger, 0.5,
                         measured=Measurement("measured", 1.0, 1))  # fmt: skip
    proposer = _proposer(screened, 3, finished=[record])
    assert proposer.study.trials[0].state == TrialState.COMPLETE
    assert len(_run(p, proposer)) == 2
