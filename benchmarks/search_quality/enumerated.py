"""Evaluations to the true optimum, on a space of which every candidate was evaluated.

The last seven sublayers of a small Llama, five options each: dense, 4 bits, half as wide, both,
skipped; 78,125 candidates on a few hundred tokens. Costs are the product's: bytes from the formats,
latency from a cost table measured here. Limits are spread between the cheapest candidate and dense,
once on size alone and once on latency alone.
Truth and what stock samplers make of it are kept; ours is searched anew in every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from autocomp.search.space import Space
from benchmarks.search_quality.enumerate import Truth, enumerated
from benchmarks.search_quality.kept import directory, kept
from benchmarks.search_quality.lines import progress
from benchmarks.search_quality.measures import evaluations_until, igd_plus, middle, pareto
from benchmarks.search_quality.methods import FRONT_METHODS, METHODS, OURS, STOCK, run, run_front
from benchmarks.search_quality.problem import METRICS, AdditiveCosts, Recorder
from benchmarks.setting import prepared

BITS = {"method": "gptq", "weights": ["dense", 4], "activations": [8]}
RULES = [
    {
        "match": "layers.[345].attention",
        "structure": {"heads": [1.0, 0.5], "skip": True},
        "bits": BITS,
    },
    {"match": "layers.[2345].ffn", "structure": {"width": [1.0, 0.5], "skip": True}, "bits": BITS},
]
OVERRIDES = {"space": RULES, "target.workload.sequence": 96}
EXAMPLES = 2

SPREAD = (0.1, 0.2, 0.35, 0.5, 0.75)
"""Where limits lie between the cheapest candidate (0) and dense (1)."""
NEAR = 1.01
"""A KL this many times the optimum is as good."""
SEEDS = 20
MOST = 300
"""Evaluations after which a run is given up; it counts as that many."""
FRONT_EVALUATIONS = (100, 200, 400)
FRONT_LIMITS = 40
"""So many sizes, evenly spread from the cheapest to dense, is a front searched at by limits."""


@dataclass(frozen=True)
class Run:
    """One search: on one limit of `metric`, or for a front where `metric` is empty."""

    method: str
    seed: int
    most: int
    metric: str = ""
    limit: float = 0.0


def figures() -> dict[str, float]:
    """Evaluations per limit and method, and distances to the true front."""
    from autocomp.workers.actors import ActorPool
    from autocomp.workers.cluster import start

    truth, place = make_truth()
    limits = {metric: limits_of(truth, metric) for metric in METRICS}
    near = [Run(m, s, MOST, metric, limit) for m, s, metric, limit in _every(limits)]
    front = [
        Run(method, seed, most)
        for most in FRONT_EVALUATIONS
        for method in FRONT_METHODS
        for seed in range(SEEDS)
    ]
    with (
        start(None, None) as cluster,
        ActorPool(Searcher, (truth, place), cluster.workers) as pool,
    ):
        found = pool.map("search", [*near, *front], progress("searches"))
    results = dict(zip([*near, *front], found, strict=True))
    return {
        "candidates": float(truth.kl.size),
        "most": float(MOST),
        **limit_figures(truth, limits),
        **near_figures(limits, results, truth.kl.size),
        **front_figures(results),
    }


def make_truth() -> tuple[Truth, Path]:
    """The enumerated space, read or made, and where it is kept."""
    with prepared("llama_cpu", overrides=OVERRIDES) as setting:
        context, task = setting.context, setting.teacher.task
        items = sorted(key for key in context.items.values() if key)
        about = [items, context.teacher_path.name, task.fingerprint("distil"), EXAMPLES]
        place = directory(about)
        costs = AdditiveCosts(**kept(place / "costs.json", lambda: _costs(setting)))
        space = ordered(setting.plan.space, costs)
        kl = enumerated(context, space, EXAMPLES, place)
    return Truth(space, costs, kl), place


def ordered(space: Space, costs: AdditiveCosts) -> Space:
    """The same space, options from large to small: to samplers a level is a number."""
    options = {
        name: sorted(offered, key=lambda option: -costs.size_bytes(name, option))
        for name, offered in space.options.items()
    }
    return Space(space.units, options)


def limits_of(truth: Truth, metric: str, spread: Sequence[float] = SPREAD) -> list[float]:
    """The limits at `spread`, tightest first."""
    costs = truth.cost(metric)
    dense = truth.problem.costs.total(metric, [0] * len(truth.space))
    return [float(costs.min() + share * (dense - costs.min())) for share in spread]


def optimum(truth: Truth, metric: str, limit: float) -> float:
    """The least KL within a limit."""
    return float(truth.kl[truth.cost(metric) <= limit * (1 + 1e-9)].min())


class Searcher:
    """Runs methods on the truth; what others than ours find is kept. Resident in a worker."""

    def __init__(self, truth: Truth, place: Path) -> None:
        self._truth, self._directory = truth, place / "searches"
        spread = [at / FRONT_LIMITS for at in range(FRONT_LIMITS)]
        self._sizes = limits_of(truth, "size_bytes", spread)
        size = truth.cost("size_bytes")
        dense, worst = size.max(), float(truth.kl[np.unravel_index(size.argmin(), size.shape)])
        self._scale = (worst, float(dense))
        points = np.stack([truth.kl.ravel(), size.ravel()], axis=1) / self._scale
        self._front = pareto(points.tolist())

    def search(self, wanted: Run) -> dict[str, float]:
        """`evaluations` until near the optimum, or `igd` and `hypervolume_percent` of a front."""
        from autocomp.core.hashing import content_key

        sizes = [] if wanted.metric else self._sizes
        key = content_key([*astuple(wanted), *sizes, version("optuna")])
        find = self._near if wanted.metric else self._distance
        path = self._directory / f"{key}.json"
        return kept(path, lambda: find(wanted), anew=wanted.method in OURS)

    def _near(self, wanted: Run) -> dict[str, float]:
        truth = self._truth
        problem = replace(truth.problem, limits={wanted.metric: wanted.limit})
        target = NEAR * optimum(truth, wanted.metric, wanted.limit)
        record = Recorder(problem, truth.lookup, wanted.most, target)
        reached = evaluations_until(run(wanted.method, problem, record, wanted.seed), target)
        return {"evaluations": wanted.most + 1 if reached is None else reached}

    def _distance(self, wanted: Run) -> dict[str, float]:
        from autocomp.front.dominance import hypervolume

        problem = self._truth.problem
        limits = [{"size_bytes": size} for size in self._sizes]
        record = Recorder(problem, self._truth.lookup, wanted.most)
        history = run_front(wanted.method, problem, limits, record, wanted.seed)
        costs = problem.costs
        pairs = [(one.kl, costs.total("size_bytes", one.vector)) for one in history]
        points = pareto((np.array(pairs) / self._scale).tolist())
        volumes = [hypervolume(each, (1.0, 1.0)) for each in (points, self._front)]
        return {
            "igd": igd_plus(points, self._front),
            "hypervolume_percent": 100 * volumes[0] / volumes[1],
        }


def limit_figures(truth: Truth, limits: Mapping[str, list[float]]) -> dict[str, float]:
    """Per limit its share of dense, how much of the space meets it, and the optimum."""
    found: dict[str, float] = {}
    for metric, row in limits.items():
        costs = truth.cost(metric)
        dense = truth.problem.costs.total(metric, [0] * len(truth.space))
        for at, limit in enumerate(row):
            found[f"{metric}_{at}_limit_percent"] = 100 * limit / dense
            found[f"{metric}_{at}_fits_percent"] = 100 * float((costs <= limit).mean())
            found[f"{metric}_{at}_optimum_kl"] = optimum(truth, metric, limit)
    return found


def near_figures(
    limits: Mapping[str, list[float]], results: Mapping[Run, Mapping[str, float]], size: int
) -> dict[str, float]:
    """Quartiles of evaluations per limit and method; the worst median of ours, and the ratios."""
    found: dict[str, float] = {}
    shares, ratios, others = [], [], []
    for metric, row in limits.items():
        for at, limit in enumerate(row):
            medians = {}
            for method in METHODS:
                runs = [Run(method, seed, MOST, metric, limit) for seed in range(SEEDS)]
                low, mid, high = middle([results[one]["evaluations"] for one in runs])
                medians[method] = min(mid, MOST)
                name = f"{metric}_{at}_{method}"
                found |= {f"{name}_low": low, f"{name}_median": mid, f"{name}_high": high}
            ours, *_ = [medians.pop(method) for method in OURS]
            shares.append(100 * ours / size)
            ratios.append(min(medians[method] for method in STOCK) / ours)
            others.append(min(medians.values()) / ours)
            found[f"{metric}_{at}_ratio"] = ratios[-1]
            found[f"{metric}_{at}_ratio_repaired"] = others[-1]
            found[f"{metric}_{at}_share_percent"] = shares[-1]
    found["median_share_percent"] = median(shares)
    found["worst_share_percent"] = max(shares)
    found["median_ratio"], found["worst_ratio"] = median(ratios), min(ratios)
    found["median_ratio_repaired"] = median(others)
    return found


def front_figures(results: Mapping[Run, Mapping[str, float]]) -> dict[str, float]:
    """Medians over the seeds of what `_distance` gives."""
    found = {}
    for most in FRONT_EVALUATIONS:
        for method in FRONT_METHODS:
            rows = [results[Run(method, seed, most)] for seed in range(SEEDS)]
            for figure in ("igd", "hypervolume_percent"):
                found[f"front_{most}_{method}_{figure}"] = median(row[figure] for row in rows)
    return found


def _every(limits: Mapping[str, list[float]]) -> list[tuple[str, int, str, float]]:
    """Slow methods first, so that the last to end is a short one."""
    return [
        (method, seed, metric, limit)
        for method in sorted(METHODS, key=lambda name: "tpe" not in name)
        for metric, row in limits.items()
        for limit in row
        for seed in range(SEEDS)
    ]


def _costs(setting: Any) -> dict[str, Any]:
    """The arguments of `AdditiveCosts` from a cost table that is measured now."""
    from autocomp.api.predictor import TablePredictor
    from autocomp.api.prepare import prepare_cost_table
    from autocomp.report.progress import Silent

    context = setting.context
    reference = asdict(context.target(None).record_reference())
    context = replace(context, references={None: reference})
    table = TablePredictor(prepare_cost_table(setting.plan, setting.study, context, Silent()))
    terms: dict[str, dict[str, dict[str, float]]] = {metric: {} for metric in METRICS}
    for name, option in setting.plan.space:
        for metric in METRICS:
            terms[metric].setdefault(name, {})[option.key] = getattr(table, metric)(name, option)
    return {
        "base": {metric: getattr(table, f"base_{metric}") for metric in METRICS},
        "terms": terms,
    }
