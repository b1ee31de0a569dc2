"""What the search finds at a budget, beside what a person would try there by hand.

The search is the product's, from the spec to the report split. Its rivals are candidates of the
same space, from the same library, trained on as many tokens, exported and measured alike:

- *uniform*: every layer pruned alike and quantised alike, as a pipeline of a pruner and a quantiser
  leaves it;
- *by hand*: some layers kept whole or narrower, the others skipped, everything in 8 bits.

Each rival is trained twice, with the settings of the model the search chose and with those of the
usual recipe, and the one that diverges less from the teacher on the search split is shown, which is
what a search goes by too. The search does not see them. In the end all are timed again, in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autocomp.core.candidate import Candidate, Distillation, Option
from autocomp.core.measurement import Measurement
from autocomp.core.unit import Unit
from autocomp.front.pick import closest_first, divergence, front
from autocomp.study.records import TrialRecord
from benchmarks.setting import SPACES, ExitOnDemand, lines
from benchmarks.side_by_side import latencies_ms

CHOSEN, DENSE = "search", "dense"
WAYS = ("milp", "evolution", "surrogate", "random", "regular", "gain", "front")
"""`proposed_by` of a search's trials."""

NEAR = 0.11
"""Shares this close are meant: widths are rounded to what runtimes like."""

ROUNDING = ("rtn", "hqq")
"""Methods that round a table."""

DENSE_COST = Measurement("measured", 100.0, 100)
"""Limits resolved against this are in percent."""


@dataclass(frozen=True)
class Recipe:
    """A candidate by hand.

    Attributes:
        layers: that are kept, all where empty; the others are skipped.
        heads, width: shares kept in them.
        bits: of their weights.
        table: bits of the word embeddings.
        embeddings: what else is done to them: `vocabulary`, `rank`, or nothing.
        rank: share of it that is kept.
    """

    layers: tuple[int, ...] = ()
    heads: float = 1.0
    width: float = 1.0
    bits: int = 8
    table: int = 8
    embeddings: str = ""
    rank: float = 0.5


@dataclass(frozen=True)
class Match:
    """A spec and its rivals.

    Attributes:
        usual: distillation settings of the usual recipe; the tokens are the chosen model's.
    """

    spec: str
    recipes: Mapping[str, Recipe]
    usual: Distillation


def run_match(match: Match) -> dict[str, float]:
    """Per model what `_figures` says and its latency, per way of proposing what `_proposals` says;
    `search_minutes`, `latency_limit` and `size_limit`.
    """
    from autocomp.api.prepare import cache_directory
    from autocomp.api.search import search

    root = cache_directory() / "benchmarks" / "rivals" / match.spec
    found = search(SPACES / f"{match.spec}.yaml", root / "search", progress=lines())
    chosen = found.pick().record
    limits = found.study.spec.budget.limits().resolve(DENSE_COST)
    figures = {
        "search_minutes": _minutes(root / "search"),
        "latency_limit": limits.latency_ms or 100.0,
        "size_limit": float(limits.size_bytes or 100),
    }
    figures |= _proposals(found.study.trials(), chosen.id)
    rivals = _rivals(match, root / "rivals", chosen.candidate)
    places = {name: (root / "rivals", trial) for name, trial in rivals.items()}
    places[CHOSEN] = (root / "search", chosen.id)
    for name, (directory, trial) in places.items():
        figures |= _figures(name, directory, trial)
    for name, latency_ms in latencies_ms(places, DENSE).items():
        figures[f"{name}_latency_ms"] = latency_ms
    for name in places:
        ratio = figures[f"{name}_latency_ms"] / figures[f"{DENSE}_latency_ms"]
        figures[f"{name}_latency"] = 100 * ratio
    return figures


class Runner:
    """A worker's trial runner, set up."""

    def __init__(self, context: Any) -> None:
        from autocomp.trial.runner import CandidateRunner

        self._runner = CandidateRunner()
        self._runner.setup({"trial": context})

    def run(self, payload: dict[str, Any]) -> dict[str, Any]:
        """One trial to its end; what is in the ledger is not run again."""
        return self._runner.run(payload)


def _rivals(match: Match, directory: Path, chosen: Candidate) -> dict[str, str]:
    """Rival → id of its better trial in the study at `directory`, all on the report split."""
    settings = {
        "chosen": chosen.distillation,
        "usual": replace(match.usual, tokens=chosen.distillation.tokens),
    }
    complete = recipe_trials(match.spec, match.recipes, settings, directory, report=True)
    found = {DENSE: DENSE}
    for name in match.recipes:
        own = [record for record in complete if record.id.startswith(f"{name}-")]
        if own:
            found[name] = closest_first(own)[0].id
    return found


def recipe_trials(
    spec: str,
    recipes: Mapping[str, Recipe],
    settings: Mapping[str, Distillation],
    directory: Path,
    *,
    report: bool = False,
) -> list[TrialRecord]:
    """Every recipe under all settings, `{recipe}-{setting}`, in a study of the spec; the complete.

    Args:
        report: also evaluate them on the report split.
    """
    from autocomp.api import prepare
    from autocomp.api.finish import open_report_split
    from autocomp.api.library import prepare_library
    from autocomp.api.phases import PhaseTimes
    from autocomp.api.plan import make_plan
    from autocomp.api.session import Session
    from autocomp.report.progress import Silent
    from autocomp.study.directory import Study
    from autocomp.workers.actors import ActorPool
    from autocomp.workers.cluster import start

    plan = make_plan(SPACES / f"{spec}.yaml", {})
    study = Study.create_or_open(directory, plan.spec)
    teacher = prepare.prepare_teacher(plan, Silent())
    context = prepare.prepare_context(plan, study, teacher)
    dense, context = prepare.measure_dense(plan, study, context, Silent())
    payloads = [
        {
            "id": f"{name}-{kind}",
            "kind": "uniform",
            "proposed_by": "baseline",
            "candidate": candidate_of(recipe, plan.units, plan.options, its).to_json(),
        }
        for name, recipe in recipes.items()
        for kind, its in settings.items()
    ]
    with ExitStack() as stack:
        cluster = stack.enter_context(ExitOnDemand(start))
        items = prepare_library(plan, teacher, cluster, Silent())
        context = replace(context, items=items)
        pool = stack.enter_context(ActorPool(Runner, (context,), cluster().workers))
        records = [TrialRecord.from_json(its) for its in pool.map("run", payloads, _progress)]
        complete = [record for record in records if record.state == "complete"]
        if report:
            session = Session(plan, study, PhaseTimes(Silent(), study.ledger), cluster, None)
            open_report_split(session, context, [dense, *complete])
    return complete


def candidate_of(
    recipe: Recipe,
    units: Sequence[Unit],
    options: Mapping[str, Sequence[Option]],
    distillation: Distillation,
) -> Candidate:
    """The recipe from options of the space.

    Raises:
        ValueError: if the space lacks one.
    """
    chosen = {unit.name: _option(recipe, unit, options[unit.name]) for unit in units}
    return Candidate.of(chosen, distillation)


def _option(recipe: Recipe, unit: Unit, offered: Sequence[Option]) -> Option:
    if len(offered) == 1:  # no choice
        return offered[0]
    wanted: Callable[[Option], bool]
    if unit.layer is not None and recipe.layers and unit.layer not in recipe.layers:
        wanted = _skipped
    elif unit.kind == "attention":
        wanted = _kept("heads", recipe.heads, unit.heads, recipe.bits)
    elif unit.kind == "ffn":
        wanted = _kept("width", recipe.width, unit.width, recipe.bits)
    elif unit.kind == "embedding":
        wanted = _table(recipe)
    else:
        wanted = _kept("", 1.0, None, 8)
    found = next((option for option in offered if wanted(option)), None)
    if found is None:
        raise ValueError(f"{unit.name} has no option for {recipe}")
    return found


def _skipped(option: Option) -> bool:
    return option.step("skip") is not None


def _kept(structure: str, share: float, whole: int | None, bits: int) -> Callable[[Option], bool]:
    """Pruned to a share of what there is and quantised, and nothing else."""
    pruned = share < 1
    names = {structure, "gptq"} if pruned else {"gptq"}

    def wanted(option: Option) -> bool:
        if {step.operator for step in option.steps} != names:
            return False
        step, quantised = option.step(structure), option.step("gptq")
        assert quantised is not None
        return (int(quantised["weights"]), int(quantised["activations"])) == (bits, 8) and (
            step is None or abs(int(step["keep"]) / (whole or 1) - share) < NEAR
        )

    return wanted


def _table(recipe: Recipe) -> Callable[[Option], bool]:
    """Word embeddings in so many bits, rounded as the space does it."""

    def wanted(option: Option) -> bool:
        steps = {step.operator: step for step in option.steps}
        rounding = next((steps.pop(name) for name in ROUNDING if name in steps), None)
        return (
            rounding is not None
            and set(steps) == ({recipe.embeddings} if recipe.embeddings else set())
            and int(rounding["weights"]) == recipe.table
            and ("rank" not in steps or float(steps["rank"]["ratio"]) == recipe.rank)
        )

    return wanted


def _figures(name: str, directory: Path, id: str) -> dict[str, float]:
    """A trial's figures in percent of dense and of the teacher; not its latency."""
    from autocomp.study.directory import Study

    study = Study.open(directory)
    records = {record.id: record for record in study.trials()}
    dense, record = records[DENSE].measured, records[id]
    assert dense is not None
    assert record.measured is not None
    reports = study.ledger.read().of("report")
    figures = {
        "size": 100 * (record.measured.size_bytes or 0) / (dense.size_bytes or 1),
        "size_mb": (record.measured.size_bytes or 0) / 1e6,
        "kl": record.teacher_kl or 0.0,
        "quality": float(record.metric["value"]),
        "report_quality": float(reports[id]["metric"]["value"]),
    }
    ratio = report_ratio(study, id)
    if ratio is not None:
        figures |= {
            "report": 100 * ratio.value,
            "report_low": 100 * ratio.low,
            "report_high": 100 * ratio.high,
        }
    return {f"{name}_{figure}": value for figure, value in figures.items()}


def _proposals(trials: Sequence[TrialRecord], chosen: str) -> dict[str, float]:
    """What came of each way of proposing: `by_{way}_{trials|whole|front|chosen|kl}`, nats."""
    searched = [trial for trial in trials if trial.kind == "search"]
    on_front = {trial.id for trial in front(searched)}
    figures: dict[str, float] = {}
    for way in WAYS:
        own = [trial for trial in searched if trial.proposed_by == way]
        whole = [trial for trial in own if trial.state == "complete"]
        counts = {
            "trials": len(own),
            "whole": len(whole),
            "front": sum(trial.id in on_front for trial in whole),
            "chosen": sum(trial.id == chosen for trial in whole),
        }
        figures |= {f"by_{way}_{name}": float(count) for name, count in counts.items() if own}
        if kls := [kl for trial in whole if (kl := divergence(trial)) is not None]:
            figures[f"by_{way}_kl"] = min(kls)
    return figures


def report_ratio(study: Any, id: str) -> Any:
    """Quality on the report split as a share of the teacher's, with its paired interval."""
    from autocomp.front.noise import Noise
    from autocomp.study.per_example import scores_of

    reports = study.ledger.read().of("report")
    qualities = {name: reports[name]["quality"] for name in (DENSE, id)}
    noise = Noise.of(qualities, scores_of(study.paths, qualities, "report"))
    return noise.ratio(id, DENSE)


def _minutes(directory: Path) -> float:
    """Of all phases of a search."""
    from autocomp.study.directory import Study

    phases = Study.open(directory).ledger.read().of("phase").values()
    return sum(float(phase["seconds"]) for phase in phases) / 60


def _progress(done: int, total: int) -> None:
    print(f"  {done}/{total} rivals", flush=True)
