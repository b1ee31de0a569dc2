"""Regret at equal evaluations, where every linear layer of a model is compressed on its own.

MiniLM on headlines, a small Llama on text, DINOv2 on pictures: for each linear layer in the blocks
how many weights are zero, bits, and how many columns share a scale; limits on their bytes. Nobody
knows the optimum: regret is against the best that any run found. Every method evaluates the same
way, by exchanging layers in a resident model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from autocomp.search.scores import replace_one, to_score
from benchmarks.search_quality.kept import directory, kept
from benchmarks.search_quality.linears import LinearScreener, linear_problem
from benchmarks.search_quality.lines import progress
from benchmarks.search_quality.measures import best_after
from benchmarks.search_quality.methods import METHODS, OURS, run
from benchmarks.search_quality.problem import Problem, Recorder
from benchmarks.setting import prepared

RULE = {
    "match": "layers.*",
    "sparsity": {"method": "sparsegpt", "levels": [0.0, 0.5, 0.75]},
    "bits": {
        "method": "gptq",
        "weights": ["dense", 8, 4, 3],
        "activations": ["dense"],
        "group": [32, 128],
    },
}
LIMITS = {"tight": 0.08, "middle": 0.12}
"""Of the dense layers' bytes: 4 bits with a scale for 128 columns take 13%, with half of them zero
11%, 3 bits with three quarters zero 7%."""
EVALUATIONS = (100, 200, 400)
SEEDS = 3


@dataclass(frozen=True)
class Case:
    """A model: its spec, the shape of an example as the workload says it, how many examples."""

    spec: str
    shape: Mapping[str, int]
    examples: int


CASES = {
    "minilm": Case("quickstart", {"target.workload.sequence": 32}, 8),
    "llama": Case("llama_cpu", {"target.workload.sequence": 64}, 2),
    "dinov2": Case("vit_cpu", {"target.workload.image": 56}, 8),
}


@dataclass(frozen=True)
class Run:
    """A method's searches on every limit, one after the other, what they evaluate shared."""

    method: str
    seed: int


def figures() -> dict[str, float]:
    """Regrets in %, by model, limit, method and evaluations."""
    found: dict[str, float] = {}
    for model, case in CASES.items():
        found |= {f"{model}_{figure}": value for figure, value in _searched(case).items()}
    return found


def _searched(case: Case) -> dict[str, float]:
    from autocomp.workers.actors import ActorPool
    from autocomp.workers.cluster import start

    with prepared(case.spec, overrides={"space": [RULE], **case.shape}) as setting:
        problem, context = linear_problem(setting), setting.context
        items = sorted(key for key in context.items.values() if key)
        task = setting.teacher.task.fingerprint("distil")
        place = directory([items, context.teacher_path.name, task, case.examples])
        runs = [
            Run(method, seed)
            for method in sorted(METHODS, key=lambda name: "tpe" not in name)
            for seed in range(SEEDS)
        ]
        args = (context, problem, case.examples, place)
        with start(None, None) as cluster, ActorPool(Searcher, args, cluster.workers) as pool:
            found = pool.map("search", runs, progress(f"searches of {case.spec}"))
    return {
        "linears": float(len(problem.space)),
        "dimensions": float(len(problem.dimensions)),
        "options": float(len(replace_one(problem.space))),
        "scores": float(scores_of(problem)),
        **regrets(dict(zip(runs, found, strict=True)), scores_of(problem)),
    }


def scores_of(problem: Problem) -> int:
    """How many replace-one scores are found first."""
    return len(to_score(problem.space, {}, problem.local))


def limits_of(problem: Problem) -> dict[str, dict[str, float]]:
    """Name of a limit → what `Problem.within` takes."""
    dense = problem.costs.total("size_bytes", [0] * len(problem.space))
    return {name: {"size_bytes": share * dense} for name, share in LIMITS.items()}


Best = dict[str, list[float | None]]
"""Limit → the best KL within it after 1, 2, 3 … evaluations."""


class Searcher:
    """Runs methods on the model; what others than ours find is kept. Resident in a worker."""

    def __init__(self, context: Any, problem: Problem, examples: int, place: Path) -> None:
        self._problem, self._directory = problem, place / "searches"
        self._screener = LinearScreener(context, problem.space, examples)

    def search(self, wanted: Run) -> Best:
        """The best so far on each limit; ours goes on for as long as its scores took."""
        from autocomp.core.hashing import content_key

        limits = limits_of(self._problem)
        most = max(EVALUATIONS)
        if wanted.method in OURS:
            most += scores_of(self._problem)
        key = content_key([wanted.method, wanted.seed, limits, most, version("optuna")])
        path = self._directory / f"{key}.json"

        def find() -> Best:
            known: dict[tuple[int, ...], float] = {}

            def lookup(vector: tuple[int, ...]) -> float:
                if vector not in known:
                    known[vector] = self._screener.divergence(vector)
                return known[vector]

            found: Best = {}
            for name, limit in limits.items():
                problem = self._problem.within(limit)
                record = Recorder(problem, lookup, most)
                history = run(wanted.method, problem, record, wanted.seed)
                found[name] = [best_after(history, count) for count in range(1, most + 1)]
            return found

        return kept(path, find, anew=wanted.method in OURS)


def regrets(results: Mapping[Run, Best], scores: int) -> dict[str, float]:
    """`{limit}_{method}_{evaluations}`: median over the seeds, in % above the best of all.

    `later` is ours on another limit, when the scores are known already. No figure where the median
    run had found nothing within the limit.
    """
    found: dict[str, float] = {}
    for limit in LIMITS:
        rows: dict[str, list[Sequence[float | None]]] = {}
        for one, best in results.items():
            rows.setdefault(one.method, []).append(best[limit])
        rows["later"] = [row[scores:] for row in rows["ours"]]
        finite = [kl for each in rows.values() for row in each for kl in row if kl is not None]
        least = min(finite)
        found[f"{limit}_best_kl"] = least
        for method, each in rows.items():
            for count in EVALUATIONS:
                values = [row[count - 1] for row in each]
                middle = median([math.inf if kl is None else kl for kl in values])
                if math.isfinite(middle):
                    found[f"{limit}_{method}_{count}"] = 100 * (middle / least - 1)
    return found
