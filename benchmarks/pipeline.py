"""One joint search against its parts, one after the other, with as many trials and tokens.

All on the quickstart's model, data, target and space:

- *joint*: `TRIALS` proposals of the whole space;
- *pipeline*: half of the proposals choose bits alone; then, with the bits of the best model fixed
  unit by unit, the other half choose structure. Its front is that of all it tried;
- *uniform*: every layer pruned and quantised alike, trained with the middle of the settings.

Hypervolumes are normalised by the dense model, see `autocomp.front.view`.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from autocomp.core.candidate import Candidate
from benchmarks.rivals import DENSE, Recipe, recipe_trials
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


def run(options: Any) -> dict[str, float]:
    """`{joint|pipeline|uniform}_hypervolume`, `_minutes`, and their ratios."""
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
    middle = Settings(joint.study.spec.distill).spread(0)
    recipe_trials(SPEC, RECIPES, {"middle": middle}, root / "uniform")
    found = {
        "joint": _volume(root / "joint"),
        "pipeline": _volume(root / "bits", root / "structure"),
        "uniform": _volume(root / "uniform"),
    }
    figures = {f"{name}_hypervolume": value for name, value in found.items()}
    figures["joint_minutes"] = _minutes(root / "joint")
    figures["pipeline_minutes"] = _minutes(root / "bits") + _minutes(root / "structure")
    figures["ratio_pipeline"] = found["joint"] / found["pipeline"]
    figures["ratio_uniform"] = found["joint"] / found["uniform"]
    return figures


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


def _volume(*directories: Path) -> float:
    """Of the front of all trials of the search or by hand; dense and its baselines aside."""
    from autocomp.front.view import study_hypervolume
    from autocomp.study.directory import Study

    studies = [Study.open(directory) for directory in directories]
    records = [r for study in studies for r in study.trials() if _counts(r, directories)]
    return study_hypervolume(records, studies[0].dense()) or 0.0


def _counts(record: Any, directories: tuple[Path, ...]) -> bool:
    """Proposals of a search; of the uniform ones, all."""
    return record.kind == "search" or (directories[0].name == "uniform" and record.id != DENSE)


def _minutes(directory: Path) -> float:
    from autocomp.study.directory import Study

    trials = [t for t in Study.open(directory).trials() if t.kind == "search"]
    return sum(sum(trial.seconds.values()) for trial in trials) / 60
