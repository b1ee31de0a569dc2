"""What is expected after training: against scikit-learn's process, and what it must make of."""

from __future__ import annotations

import math

import numpy as np
import pytest
from search_problems import problem
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

from autocomp.core.candidate import Candidate, Distillation
from autocomp.search.gain import Gain, Shapes, Trained
from autocomp.study.records import TrialRecord

SETTINGS = Distillation(tokens=1000, lr=2e-4, temperature=2.0)


def trained(vectors: list[tuple[int, ...]], kl: list[float]) -> list[Trained]:
    return [Trained(v, SETTINGS, value) for v, value in zip(vectors, kl, strict=True)]


def test_points_are_shares_of_units_a_step_is_done_to() -> None:
    space = problem().space  # six feed-forward units and a table of five options
    shapes = Shapes(space)
    plain, skipped, half = shapes.points([(0,) * 7, (4,) * 7, (3, 3, 3, 0, 0, 0, 0)])
    assert not plain.any()
    kinds = {unit.kind for unit in space.units}
    assert sorted(skipped[skipped > 0]) == pytest.approx([1.0] * len(kinds))
    of_kind = sum(unit.kind == space.units[0].kind for unit in space.units)
    assert set(half[half > 0].round(6)) <= {round(k / of_kind, 6) for k in (1, 2, 3)} | {1.0, 0.5}
    assert half.sum() == pytest.approx(sum(2 / _count(space, u) for u in (0, 1, 2)))


def _count(space: object, at: int) -> int:
    units = space.units  # type: ignore[attr-defined]
    return sum(unit.kind == units[at].kind for unit in units)


def test_it_is_the_process_of_scikit_learn() -> None:
    """Where settings and screening are the same for all, and the spread is that of the values."""
    space = problem().space
    shapes = Shapes(space)
    rng = np.random.default_rng(0)
    vectors = [space.random(rng) for _ in range(12)]
    kl = rng.uniform(0.05, 0.5, size=8)
    gain = Gain(shapes, lambda _: 0.1, trained(vectors[:8], kl.tolist()))
    mean, deviation = gain.predict(vectors, SETTINGS)
    peer = GaussianProcessRegressor(RBF(1.0) + ConstantKernel(1 / 3), alpha=0.1, optimizer=None)
    logs = np.log(kl)
    points = shapes.points(vectors)
    peer.fit(points[:8], (logs - logs.mean()) / logs.std())
    its_mean, its_deviation = peer.predict(points, return_std=True)
    np.testing.assert_allclose(mean, logs.mean() + logs.std() * its_mean, rtol=1e-8)
    np.testing.assert_allclose(deviation, logs.std() * its_deviation, rtol=1e-6)


def test_without_trials_all_are_expected_alike_and_doubt_is_large() -> None:
    space = problem().space
    mean, deviation = Gain(Shapes(space), lambda _: 0.1, []).predict([(0,) * 7, (4,) * 7], SETTINGS)
    assert mean[0] == mean[1] == 0
    assert (deviation > 0.4).all()
    nothing, _ = Gain(Shapes(space), lambda _: 0.1, []).predict([], SETTINGS)
    assert len(nothing) == 0


def test_of_alike_shapes_screening_tells_the_better() -> None:
    """The order of two units' options is all the same to a shape, not to screening."""
    space = problem().space
    screened = {
        v: 0.1 * (1 + i) for i, v in enumerate([(1, 2, 0, 0, 0, 0, 0), (2, 1, 0, 0, 0, 0, 0)])
    }
    one, other = screened
    known = [(1, 0, 0, 0, 0, 0, 0), (2, 0, 0, 0, 0, 0, 0), (3, 0, 0, 0, 0, 0, 0)]
    kl = {**screened, **dict(zip(known, (0.1, 0.2, 0.4), strict=True))}
    gain = Gain(Shapes(space), kl.__getitem__, trained(known, [0.1, 0.14, 0.2]))
    mean, _ = gain.predict([one, other], SETTINGS)
    if space.units[0].kind == space.units[1].kind:
        assert mean[0] < mean[1]


def test_settings_explain_what_shapes_do_not() -> None:
    """A shape trained badly is not a bad shape."""
    space = problem().space
    bad = Distillation(tokens=1000, lr=1e-6, temperature=2.0)
    one, other = (1,) * 7, (2,) * 7
    seen = [Trained(one, bad, 0.8), Trained(other, SETTINGS, 0.2), Trained(other, bad, 0.8)]
    gain = Gain(Shapes(space), lambda _: 0.1, seen)
    assert gain.predict([one], SETTINGS)[0][0] < gain.predict([one], bad)[0][0] - 0.3


def test_what_is_pending_leaves_less_doubt_about_its_neighbours() -> None:
    space = problem().space
    seen = trained([(0,) * 7, (4,) * 7], [0.1, 0.4])
    asked, far = (1,) * 7, (2,) * 7
    without = Gain(Shapes(space), lambda _: 0.1, seen)
    pending = Gain(Shapes(space), lambda _: 0.1, seen, [(asked, SETTINGS)])
    before, after = (g.predict([asked, far], SETTINGS) for g in (without, pending))
    np.testing.assert_allclose(before[0], after[0], rtol=0.05)
    assert after[1][0] < 0.5 * before[1][0]
    assert after[1][1] > 0.8 * before[1][1]


def test_a_trial_counts_by_its_first_rung() -> None:
    space = problem().space
    candidate = space.decode((1,) * 7, SETTINGS)

    def of(**changes: object) -> Trained | None:
        fields: dict[str, object] = {"candidate": candidate, "state": "complete", **changes}
        return Trained.of(TrialRecord("a", "search", "milp", **fields), space)  # type: ignore[arg-type]

    rungs = tuple({"rung": i, "teacher_kl": kl} for i, kl in enumerate((0.3, 0.2)))
    assert of(teacher_kl=0.1) == Trained((1,) * 7, SETTINGS, 0.1)
    assert of(teacher_kl=0.1, rungs=rungs) == Trained((1,) * 7, SETTINGS, 0.3)
    assert of(state="pruned", rungs=rungs) == Trained((1,) * 7, SETTINGS, 0.3)
    assert of() is of(teacher_kl=math.nan) is None
    assert of(teacher_kl=0.1, candidate=Candidate.of({})) is None
