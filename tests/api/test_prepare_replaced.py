"""From a spec that replaces attention to library items: what is recorded, trained, and told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from autocomp.api import prepare
from autocomp.api.library import prepare_library
from autocomp.api.listing import list_kind
from autocomp.api.plan import make_plan
from autocomp.core.candidate import Option, Step
from autocomp.core.errors import SpecError
from autocomp.library.store import Library
from autocomp.operators.replace import distil as distil_module
from autocomp.operators.replace.distil import Settings
from autocomp.report.progress import Silent

sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))
from tiny_study import SPEC, sentences, write_model, write_rows

ELU = Option((Step.of("replace", mixer="elu"),))


def write_spec(root: Path, structure: dict[str, Any], match: str = "layers.*.attention") -> Path:
    """The tiny spec, its attention offering mixers as well as bits."""
    spec = yaml.safe_load(SPEC.read_text(encoding="utf-8"))
    if not (root / "model").exists():
        write_model(root / "model")
    spec["model"]["source"] = str(root / "model")
    spec["task"]["teacher"] = {"fit": "full", "epochs": 1, "lr": 1e-3, "batch": 16}
    spec["task"]["data"]["source"] = str(write_rows(root / "data.jsonl", sentences()))
    bits = {"method": "gptq", "weights": ["dense", 8]}
    spec["space"] = [{"match": match, "structure": structure, "bits": bits}]
    path = root / "spec.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    return path


class Phases(Silent):
    """Remembers what was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int | None]] = []
        self.done: list[int] = []

    def phase(self, name: str, total: int | None = None) -> None:
        self.told.append((name, total))

    def advance(self, done: int, total: int | None = None) -> None:
        if self.told[-1][0] == "library":
            self.done.append(done)


def test_a_spec_that_replaces_becomes_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(distil_module, "SETTINGS", Settings(steps=3, trial_steps=1))

    def here(function: Any, tasks: Any, workers: int, advance: Any) -> list[Any]:
        found = []
        for number, task in enumerate(tasks):
            if task.trained is not None:
                recordings = list((tmp_path / "cache" / "statistics").rglob("*recording*"))
                assert len(recordings) == 2
            found.append(function(task))
            advance(number + 1, len(tasks))
        return found

    monkeypatch.setattr("autocomp.workers.tasks.run_tasks", here)
    cluster: Any = lambda: type("Cluster", (), {"workers": 1})()  # noqa: E731
    plan = make_plan(write_spec(tmp_path, {"replace": ["elu"], "at_most": 1}))
    assert [cap.most for cap in plan.space.caps] == [1]
    assert plan.space.caps[0].units == ("layers.0.attention", "layers.1.attention")
    teacher = prepare.prepare_teacher(plan, Silent())
    progress = Phases()
    keys = prepare_library(plan, teacher, cluster, progress)
    library = Library(prepare.library_path())
    item = library.describe(keys["layers.0.attention", ELU.key])
    assert item is not None
    words = sum(len(row["text"].split()) + 2 for row in sentences())
    tokens = item["training"]["tokens"] + item["training"]["held_out_tokens"]
    calibration = sum(
        teacher.task.tokens(b) for b in teacher.task.batches("calibrate", 32, trim=True)
    )
    assert calibration < tokens < words  # the distil split's as well
    assert progress.told[-1] == ("library", progress.done[-1])
    assert progress.done == sorted(progress.done)
    assert not list((tmp_path / "cache" / "statistics").rglob("*.safetensors"))
    again = Phases()
    assert prepare_library(plan, teacher, cluster, again) == keys
    assert again.told[-1] == ("library", 0)


@pytest.mark.parametrize(
    ("structure", "match", "message"),
    [
        ({"replace": ["elo"]}, "layers.*.attention", r"replace\[0\]: unknown 'elo'\. Did you mean"),
        ({"replace": ["elu"]}, "layers.*.ffn", r"kind ffn holds no attention"),
        ({"at_most": 1}, "layers.*.attention", "at_most caps"),
    ],
)
def test_what_cannot_be_is_refused_at_its_line(
    structure: dict[str, Any], match: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=message):
        make_plan(write_spec(tmp_path, structure, match))


def test_mixers_are_listed() -> None:
    row = next(row for row in list_kind("mixers") if row["name"] == "elu")
    assert row["summary"].startswith("Linear attention")
    assert "Katharopoulos" in row["paper"]
