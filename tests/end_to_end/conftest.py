"""One model, one data set, one cache and one finished study for all tests of this directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_study import ROOT, Command, sentences, write_model, write_rows


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The command line on the tiny study, its cache empty at first."""
    base = tmp_path_factory.mktemp("tiny")
    model = write_model(base / "model")
    data = write_rows(base / "data.jsonl", sentences())
    return Command(model, data, base / "cache", base)


@pytest.fixture(scope="session")
def footprint() -> dict[str, set[str]]:
    """What the search of `finished` left in its working directory and in this checkout."""
    return {}


@pytest.fixture(scope="session")
def finished(command: Command, footprint: dict[str, set[str]]) -> Path:
    """A study that was searched once, without interruption. Read only: copy it to change it."""
    study = command.directory / "finished"
    here, checkout = entries(command.directory), entries(ROOT)
    # Named relative to the working directory, as a person does; workers have another one.
    ended = command.search(Path("finished"), options=("--json",))
    assert ended.status == 0, ended.err
    footprint["working directory"] = entries(command.directory) - here
    footprint["checkout"] = entries(ROOT) - checkout
    (command.directory / "printed.json").write_text(ended.out, encoding="utf-8")
    return study


def entries(directory: Path) -> set[str]:
    """Files and directories up to two levels down, without what interpreters and tools cache."""
    return {
        str(path.relative_to(directory))
        for pattern in ("*", "*/*")
        for path in directory.glob(pattern)
        if not any(
            part.startswith(".") or part == "__pycache__"
            for part in path.relative_to(directory).parts
        )
    }


@pytest.fixture
def cut_back(finished: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a study that got no further than the given kinds of ledger entries."""

    def cut(*kinds: str, trials: tuple[str, ...] = ("dense",)) -> Path:
        study = tmp_path / "study"
        shutil.copytree(finished, study, ignore=shutil.ignore_patterns("mlflow*", "mlartifacts"))
        kept = []
        for line in (study / "ledger.jsonl").read_text(encoding="utf-8").splitlines(keepends=True):
            kind, key = line.split('"')[3], line.split('"')[7]
            if kind in ("reference", *kinds) or (kind == "trial" and key in trials):
                kept.append(line)
        (study / "ledger.jsonl").write_text("".join(kept), encoding="utf-8")
        for artifact in (study / "artifacts").iterdir():
            if artifact.name not in trials:
                shutil.rmtree(artifact)
        for name in ("front.html", "front.json"):
            (study / name).unlink()
        return study

    return cut
