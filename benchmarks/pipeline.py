"""One joint search against its parts, one after the other.

All on the quickstart's model, data, target and space:

- *pipeline*: half of `TRIALS` proposals choose bits alone; then, with the bits of the best model
  fixed unit by unit, the other half choose structure. Its front is that of all it tried;
- *joint*: as many proposals of the whole space, then as many as the pipeline's time is enough for;
- *uniform*: every layer pruned and quantised alike, trained with the middle of the settings.

Hypervolumes are of quality, latency and size as shares of dense, from three reference points: see
`REFERENCES`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autocomp.core.candidate import Candidate
from benchmarks.rivals import DENSE, DENSE_COST, Recipe, recipe_trials
from benchmarks.setting import SPACES, lines

SPEC = "quickstart"
TRIALS = 12
RECIPES = {
    f"{share:g}, {bits} bits": Recipe(heads=share, width=share, bits=bits, table=bits)
    for share, bits in itertools.product((1.0, 0.75, 0.5, 0.25), (8, 4))
}
BITS_ONLY: dict[str, Any] = {
    "space[0].structure": {},
    "space[1].structure": {},
    "budget": {"size": "20%"},
}
"""A quantiser has no way to a fifth of the latency: it is asked for what it can."""

WORTH = 0.95
"""Share of dense's quality below which a model is of no use."""
REFERENCES = ("all", "worth", "budget")
"""From no quality at dense's costs; from `WORTH` at dense's costs; from `WORTH` at the budget."""


def run(options: Any) -> dict[str, float]:
    """`{way}_{reference}`, `{way}_trials`, `{way}_minutes`."""
    from autocomp.api.prepare import cache_directory
    from autocomp.api.search import search
    from autocomp.search.settings import Settings

    root = cache_directory() / "benchmarks" / "pipeline"
    spec = SPACES / f"{SPEC}.yaml"
    joint = search(spec, root / "joint", trials=TRIALS, progress=lines())
    bits = (
        search(spec, root / "bits", trials=TRIALS // 2, overrides=BITS_ONLY, progress=lines())
        .pick()
        .record
    )
    structure = {"space": _fixed(joint.study.spec, bits.candidate)}
    search(spec, root / "structure", trials=TRIALS // 2, overrides=structure, progress=lines())
    parts = [root / "bits", root / "structure"]
    first = _searched(root / "joint")[:TRIALS]
    longer = round(TRIALS * _minutes(_searched(*parts)) / _minutes(first))
    if longer > TRIALS:
        search(spec, root / "joint", trials=longer, progress=lines())
    middle = Settings(joint.study.spec.distill).spread(0)
    recipe_trials(SPEC, RECIPES, {"middle": middle}, root / "uniform")
    found = {
        "joint": first,
        "joint_longer": _searched(root / "joint"),
        "pipeline": _searched(*parts),
        "uniform": [trial for trial in _trials(root / "uniform") if trial[0].id != DENSE],
    }
    limits = joint.study.spec.budget.limits().resolve(DENSE_COST)
    budget = ((limits.latency_ms or 100) / 100, (limits.size_bytes or 100) / 100)
    figures: dict[str, float] = {}
    for name, trials in found.items():
        figures[f"{name}_trials"] = float(len(trials))
        figures[f"{name}_minutes"] = _minutes(trials)
        figures |= {f"{name}_{of}": value for of, value in _volumes(trials, budget).items()}
    return figures


def table(figures: dict[str, float]) -> list[list[str]]:
    """A row per way, then what the joint search has of the pipeline's."""
    head = ["", "trials", "minutes of a core", "hypervolume", f"above {WORTH:.0%} of the quality"]
    rows = [[*head, f"above {WORTH:.0%}, within the budget"]]
    labels = {
        "joint": "joint search, as many trials",
        "joint_longer": "joint search, as much time",
        "pipeline": "best quantiser, then best pruner",
        "uniform": "uniform, distilled alike",
    }
    for way, label in labels.items():
        costs = [f"{figures[f'{way}_trials']:.0f}", f"{figures[f'{way}_minutes']:.1f}"]
        rows.append([label, *costs, *(f"{figures[f'{way}_{of}']:.3g}" for of in REFERENCES)])
    for way in ("joint", "joint_longer"):
        columns = ("trials", "minutes", *REFERENCES)
        ratios = [figures[f"{way}_{of}"] / figures[f"pipeline_{of}"] for of in columns]
        cells = [f"{ratio:.2f}×" for ratio in ratios[:2]] + [f"**{r:.2f}×**" for r in ratios[2:]]
        rows.append([f"{labels[way]}, to the pipeline (goal ≥ 1.3×)", *cells])
    return rows


def _fixed(spec: Any, chosen: Candidate) -> list[dict[str, Any]]:
    """A rule for each unit: the structure of the spec's rule, the bits that were chosen."""
    from fnmatch import fnmatch

    rules = []
    for unit, option in chosen:
        rule = next((r for r in reversed(spec.space) if fnmatch(unit, r.match)), None)
        if rule is None:
            continue
        found = rule.model_dump(exclude_none=True, exclude_defaults=True)
        step = option.steps[-1] if option.steps else None
        if step is None:
            found.pop("bits", None)
        else:
            args = dict(step.args)
            found["bits"] = {
                **found["bits"],
                "weights": [args["weights"]],
                "activations": [args["activations"]],
            }
            if unit == "embeddings":
                found["bits"].pop("activations")
        rules.append({**found, "match": unit})
    return rules


Trial = tuple[Any, Any]
"""A trial's record, and that of the dense model it was measured beside."""


def _searched(*directories: Path) -> list[Trial]:
    """The proposals of searches, in the order they ended."""
    return [trial for trial in _trials(*directories) if trial[0].kind == "search"]


def _trials(*directories: Path) -> list[Trial]:
    from autocomp.study.directory import Study

    studies = [Study.open(directory) for directory in directories]
    return [(record, study.dense()) for study in studies for record in study.trials()]


def _volumes(trials: Sequence[Trial], budget: tuple[float, float]) -> dict[str, float]:
    """Hypervolume from each of `REFERENCES`; `budget` is in shares of dense."""
    from autocomp.front.dominance import hypervolume
    from autocomp.front.pick import OBJECTIVES, objective, rankable, senses

    points = [
        [(objective(record, name) or 0.0) / (objective(dense, name) or 1.0) for name in OBJECTIVES]
        for record, dense in trials
        if rankable(record)
    ]
    references = ([0.0, 1.0, 1.0], [WORTH, 1.0, 1.0], [WORTH, *budget])
    assert OBJECTIVES == ("quality", "latency", "size")
    return {
        name: hypervolume(points, reference, senses(OBJECTIVES))
        for name, reference in zip(REFERENCES, references, strict=True)
    }


def _minutes(trials: Sequence[Trial]) -> float:
    return sum(sum(record.seconds.values()) for record, _ in trials) / 60
