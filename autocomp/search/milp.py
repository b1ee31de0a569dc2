"""Solve for a budget: one option per unit, least summed score, every limit met.

A multiple-choice knapsack as a mixed-integer linear programme (`scipy.optimize.milp`, HiGHS):
minimise Σ score[u, o]·x[u, o], Σ_o x[u, o] = 1, base + Σ cost[u, o]·x[u, o] ≤ limit per metric,
and Σ x[u, o] ≤ most over the options that a cap of the space counts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from autocomp.core.errors import InfeasibleError
from autocomp.core.quantities import format_bytes, format_ms
from autocomp.search.costs import Costs, Limits
from autocomp.search.quiet import stdout_to_stderr
from autocomp.search.space import Vector, hamming

logger = logging.getLogger(__name__)

Weights = Sequence[NDArray[np.float64]]
"""One array of option scores per unit; `inf` forbids an option."""

_EXPANSIONS = 12
"""How often costs that are not linear are expanded around the last solution."""

_NAMES = {"latency_ms": "latency", "size_bytes": "size", "peak_memory_bytes": "peak memory"}


def solve(
    weights: Weights,
    costs: Costs,
    limits: Limits,
    *,
    avoid: Sequence[tuple[Vector, int]] = (),
    seconds: float = 5.0,
) -> Vector | None:
    """The vector of least summed weight within the limits, or `None` if there is none.

    Args:
        weights: scores; `inf` forbids an option. What costs `inf` is forbidden too.
        costs: linear cost terms.
        limits: upper limit per metric.
        avoid: (vector, distance) pairs: the result differs from each in at least that many units.
        seconds: time limit; the best solution found by then is returned.

    Where the costs are not linear, see `_solve_expanded`.
    """
    if not costs.linear:
        return _solve_expanded(weights, costs, limits, avoid, seconds)
    base, terms = costs.base["latency_ms"], costs.terms["latency_ms"]
    vector = _solve_linear(weights, costs, limits, base, terms, avoid, seconds)
    if vector is not None and not costs.fits(vector, limits):  # known to happen: scipy#24141
        logger.warning("the solver returned a solution outside the limits; it is dropped")
        return None
    return vector


def _solve_expanded(
    weights: Weights,
    costs: Costs,
    limits: Limits,
    avoid: Sequence[tuple[Vector, int]],
    seconds: float,
) -> Vector | None:
    """A good vector within limits that are not linear, or `None` if none was found.

    Latency is expanded around the last solution and solved for again, until one is within the
    limits or they come round again; then around the best one, in a neighbourhood that shrinks
    when it holds nothing better.
    """
    best: tuple[float, Vector] | None = None
    base, terms = costs.base["latency_ms"], costs.terms["latency_ms"]
    reach = len(weights)
    seen: set[Vector] = set()
    for _ in range(_EXPANSIONS):
        near = None if best is None else (best[1], reach)
        vector = _solve_linear(weights, costs, limits, base, terms, avoid, seconds, near)
        if best is None:
            if vector is None:  # out of reach, as it seems from here: look from the cheapest
                vector = _cheapest(weights, costs, terms, seconds)
            if vector in seen:
                vector = _cheapened(vector, weights, costs, limits)
            if vector is None:
                return None
            seen.add(vector)
        better = False
        if vector is not None and costs.fits(vector, limits) and _apart(vector, avoid):
            value = float(sum(row[o] for row, o in zip(weights, vector, strict=True)))
            better = best is None or value < best[0]
            if better:
                best, reach = (value, vector), len(weights)
        if best is None:
            assert vector is not None
            base, terms = costs.around(vector)
            continue
        if not better:
            reach = (reach + 1) // 2 if reach > 1 else 0
            if vector == best[1] or not reach:
                break
        base, terms = costs.around(best[1])
    return None if best is None else best[1]


def _cheapest(
    weights: Weights, costs: Costs, terms: Sequence[NDArray[np.float64]], seconds: float
) -> Vector | None:
    """The allowed options of least cost, within the caps."""
    allowed = [
        np.where(np.isfinite(row), cost, np.inf) for row, cost in zip(weights, terms, strict=True)
    ]
    vector = tuple(int(np.argmin(row)) for row in allowed)
    if costs.within_caps(vector):
        return vector
    return _solve_linear(allowed, costs, {}, 0.0, terms, (), seconds)


def _apart(vector: Vector, avoid: Sequence[tuple[Vector, int]]) -> bool:
    return all(hamming(vector, other) >= distance for other, distance in avoid)


def _cheapened(vector: Vector, weights: Weights, costs: Costs, limits: Limits) -> Vector | None:
    """`vector` after the switches of single units that save most latency, until it fits."""
    others = {metric: limit for metric, limit in limits.items() if metric != "latency_ms"}
    while not costs.fits(vector, limits):
        _, switched = costs.around(vector)
        moves = sorted(
            (float(change[option]), unit, option)
            for unit, change in enumerate(switched)
            for option in np.flatnonzero(np.isfinite(weights[unit]) & (change < 0)).tolist()
        )
        moved = ((*vector[:unit], option, *vector[unit + 1 :]) for _, unit, option in moves)
        found = next((one for one in moved if costs.fits(one, others)), None)
        if found is None:
            return None
        vector = found
    return vector


def _solve_linear(
    weights: Weights,
    costs: Costs,
    limits: Limits,
    base_ms: float,
    terms_ms: Sequence[NDArray[np.float64]],
    avoid: Sequence[tuple[Vector, int]],
    seconds: float,
    near: tuple[Vector, int] | None = None,
) -> Vector | None:
    """`solve` with these terms of latency; the other metrics' are those of `costs`.

    `near`: (vector, distance); the result differs from it in at most that many units.
    """
    counts = [len(row) for row in weights]
    flat = np.concatenate(costs.forbid(weights))
    allowed = np.isfinite(flat)
    starts = np.concatenate(([0], np.cumsum(counts)))
    columns = int(starts[-1])
    unit_of = np.repeat(np.arange(len(counts)), counts)
    choose = csr_array(
        (np.ones(columns), (unit_of, np.arange(columns))), shape=(len(counts), columns)
    )
    constraints = [LinearConstraint(choose, 1, 1)]
    for metric, limit in limits.items():
        latency = metric == "latency_ms"
        terms = np.concatenate(list(terms_ms if latency else costs.terms[metric]))
        # relative: well scaled for the solver
        row = np.where(np.isfinite(terms), terms, 0.0) / limit
        room = 1.0 - (base_ms if latency else costs.base[metric]) / limit
        constraints.append(LinearConstraint(row[None, :], -np.inf, room))
    for counted, most in costs.caps:
        constraints.append(LinearConstraint(np.concatenate(counted)[None, :], -np.inf, most))
    for vector, distance in avoid:
        same = np.zeros((1, columns))
        same[0, starts[:-1] + np.array(vector)] = 1.0
        constraints.append(LinearConstraint(same, -np.inf, len(counts) - distance))
    if near is not None:
        same = np.zeros((1, columns))
        same[0, starts[:-1] + np.array(near[0])] = 1.0
        constraints.append(LinearConstraint(same, len(counts) - near[1], np.inf))
    scale = float(flat[allowed].max()) or 1.0
    with stdout_to_stderr():  # HiGHS prints a line now and then, whatever it is told
        result = milp(
            np.where(allowed, flat, 0.0) / scale,
            integrality=np.ones(columns),
            bounds=Bounds(0.0, allowed.astype(float)),
            constraints=constraints,
            # with presolve it prints more of them
            options={"time_limit": seconds, "mip_rel_gap": 1e-4, "presolve": False},
        )
    if result.x is None:
        return None
    chosen = [int(np.argmax(result.x[starts[u] : starts[u + 1]])) for u in range(len(counts))]
    return tuple(chosen)


def seeds(
    weights: Weights,
    costs: Costs,
    limits: Limits,
    count: int,
    seed: int,
    *,
    tightest: float = 0.7,
    jitter: float = 0.3,
) -> list[Vector]:
    """Diverse good starts: solutions at a spread of budgets, with jittered scores.

    The first is the optimum of the additive model under the limits themselves. The others solve
    for fractions of the limits between `tightest` and 1, with scores multiplied by
    exp(N(0, jitter²)), each differing from all earlier ones in a tenth of the units or more.

    Returns:
        At most `count` distinct vectors, all within the limits; fewer if no more exist.

    Raises:
        InfeasibleError: if nothing meets the limits themselves.
    """
    rng = np.random.default_rng(seed)
    first = solve(weights, costs, limits)
    if first is None:
        raise InfeasibleError(why_infeasible(weights, costs, limits))
    found = [first]
    distance = max(1, len(costs.space.free) // 10)
    fractions = np.linspace(1.0, tightest, max(2, min(count, 6)))
    for index in range(1, count):
        fraction = float(fractions[index % len(fractions)])
        noisy = [row * np.exp(rng.normal(0.0, jitter, len(row))) for row in weights]
        tight = {metric: limit * fraction for metric, limit in limits.items()}
        avoid = [(vector, distance) for vector in found]
        vector = solve(noisy, costs, tight, avoid=avoid, seconds=2.0)
        if vector is None and fraction < 1.0:
            vector = solve(noisy, costs, limits, avoid=avoid, seconds=2.0)
        if vector is None and distance > 1:
            distance = 1
            avoid = [(old, 1) for old in found]
            vector = solve(noisy, costs, limits, avoid=avoid, seconds=2.0)
        if vector is None:
            break
        found.append(vector)
    return found


def check_reachable(weights: Weights, costs: Costs, limits: Limits) -> None:
    """Raise if no candidate meets the limits.

    Raises:
        InfeasibleError: with the smallest reachable value of each limit, what binds, what to allow.
    """
    if solve([np.where(np.isfinite(row), 0.0, np.inf) for row in weights], costs, limits) is None:
        raise InfeasibleError(why_infeasible(weights, costs, limits))


def why_infeasible(weights: Weights, costs: Costs, limits: Limits) -> str:
    """Why nothing meets the limits: what is reachable, which unit holds most of it, what to do."""
    usable = [np.isfinite(row) for row in costs.forbid(weights)]
    reasons, advice = [], []
    for metric, limit in limits.items():
        shares = [
            float(terms[ok].min()) for terms, ok in zip(costs.terms[metric], usable, strict=True)
        ]
        smallest = costs.base[metric] + sum(shares)
        if costs.caps:
            terms = [
                np.where(ok, t, np.inf) for t, ok in zip(costs.terms[metric], usable, strict=True)
            ]
            lowest = _cheapest(terms, costs, terms, 5.0)
            if lowest is not None:
                shares = [float(row[o]) for row, o in zip(terms, lowest, strict=True)]
                smallest = costs.base[metric] + sum(shares)
        if smallest > limit:
            largest = int(np.argmax(shares))
            name, most = costs.space.names[largest], shares[largest]
            if most >= costs.base[metric]:
                advice.extend(_allow(costs, largest))
            else:
                name, most = "what no rule can change", costs.base[metric]
            reasons.append(
                f"No candidate meets {_limit(metric, limit)}: the smallest in this space is "
                f"{_value(metric, smallest)} ({name} {_value(metric, most)} of it)."
            )
    if not reasons:
        alone = [
            f"{_NAMES[metric]} alone can reach {_value(metric, costs.smallest(metric))}"
            for metric in limits
        ]
        reasons.append(
            f"No candidate meets {' and '.join(_limit(*item) for item in limits.items())} "
            f"together: {', '.join(alone)}."
        )
        for metric, limit in limits.items():
            others = {name: value for name, value in limits.items() if name != metric}
            cost = [
                np.where(ok, terms / limit, np.inf)
                for terms, ok in zip(costs.terms[metric], usable, strict=True)
            ]
            best = solve(cost, costs, others)
            if best is not None:
                reached = _value(metric, costs.total(metric, best))
                kept = " and ".join(_limit(*item) for item in others.items())
                reasons.append(f"Within {kept} the smallest {_NAMES[metric]} is {reached}.")
    next_step = f"Allow {' or '.join(dict.fromkeys(advice))}, or raise" if advice else "Raise"
    return f"{' '.join(reasons)} {next_step} the budget."


def _allow(costs: Costs, unit: int) -> list[str]:
    """What this unit is not offered yet that would shrink it."""
    described = costs.space.units[unit]
    offered = [step for option in costs.space.options[described.name] for step in option.steps]
    bits = [dict(step.args).get("weights") for step in offered]
    advice = []
    if 4 not in bits:
        advice.append(f"4-bit {described.name} (bits.weights)")
    if described.skippable and not any(step.operator == "skip" for step in offered):
        advice.append(f"skipping {described.name} (structure.skip)")
    return advice


def _value(metric: str, value: float) -> str:
    return format_ms(value) if metric == "latency_ms" else format_bytes(value)


def _limit(metric: str, limit: float) -> str:
    return f"{_NAMES[metric]} ≤ {_value(metric, limit)}"
