"""Bad input: one clear message, exit 2 or 3, no traceback, nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_study import SPEC, Command, Ended, sentences, stamps, write_rows

from autocomp.cli.main import cli

pytestmark = pytest.mark.timeout(900)  # a busy host; seconds on an idle one

Run = Callable[..., Ended]


@pytest.fixture
def run(command: Command, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process, which these never get far in."""
    monkeypatch.setenv("AUTOCOMP_CACHE", str(command.cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(command.directory)

    def invoke(*arguments: str | Path) -> Ended:
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        return Ended(result.exit_code, result.stdout, result.stderr)

    return invoke


@pytest.fixture
def spec_file(command: Command, tmp_path: Path) -> Callable[[str, str], Path]:
    """The tiny spec with one piece of text replaced, on the fixture's model and data."""

    def write(old: str, new: str) -> Path:
        text = SPEC.read_text(encoding="utf-8")
        assert text.count(old) == 1, old
        text = text.replace(old, new).replace("./tiny/model", str(command.model))
        path = tmp_path / "mine.yaml"
        path.write_text(text.replace("./tiny/data.jsonl", str(command.data)), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("objectives:", "objectifs:", ["objectifs", "Did you mean 'objectives'?"]),
        ("screen: 24", "screen: many", ["search.screen", "'many'"]),
        ("latency: 95%", "latency: 95 parsecs", ["budget.latency", "parsecs", "4 ms"]),
        ("match: embeddings", "match: embedings", ["embedings", "Did you mean", "embeddings"]),
        ("method: gptq", "method: gpqt", ["gpqt", "Did you mean 'gptq'?", "autocomp ls operators"]),
        ("weights: [dense, 8], group", "weights: [dense, 7], group", ["7", "8"]),
        ("heads: [1.0, 0.5]", "heads: [1.0, 1.5]", ["structure.heads", "1.5"]),
        (
            "runtime: onnxruntime",
            "runtime: onnxruntme",
            ["onnxruntme", "Did you mean 'onnxruntime'"],
        ),
        ("name: text-classification", "name: text-clasification", ["Did you mean"]),
    ],
)
def test_a_wrong_spec(
    run: Run, spec_file: Callable[[str, str], Path], old: str, new: str, said: list[str]
) -> None:
    path = spec_file(old, new)
    lines = path.read_text(encoding="utf-8").splitlines()
    line = next(number for number, text in enumerate(lines, 1) if new in text)
    studies = path.parent / "study"
    for verb in (["check", path], ["search", path, "--study", studies]):
        message = run(*verb).complaint()
        assert message.startswith(str(path)), message
        found = int(message.removeprefix(f"{path}:").split()[0].rstrip(":"))
        assert line - 1 <= found <= line, message  # rules are placed at their first line
        for words in said:
            assert words in message
    assert not studies.exists()


def test_sources_that_are_not_there(run: Run, command: Command) -> None:
    gone = command.with_(data=command.directory / "dato.jsonl")
    message = run("check", *gone.spec_arguments()).complaint()
    assert "dato.jsonl. Did you mean 'data.jsonl'?" in message
    gone = command.with_(model=command.directory / "modle")
    assert "Did you mean 'model'?" in run("check", *gone.spec_arguments()).complaint()
    assert "no such file" in run("check", "nowhere.yaml").complaint()
    assert "no such study" in run("front", command.directory / "nowhere").complaint()
    message = run("check", *command.spec_arguments("model.source=package:no_such/model"))
    assert "no package 'no_such' is installed" in message.complaint()


def test_data_without_the_label_column(run: Run, command: Command, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "topic": row["label"]} for row in sentences(60)]
    data = write_rows(tmp_path / "data.jsonl", rows)
    message = run("check", *command.with_(data=data).spec_arguments()).complaint()
    assert "label" in message
    assert "text, topic" in message


def test_a_label_seen_only_at_evaluation(run: Run, command: Command, tmp_path: Path) -> None:
    rows = [*sentences(200), *({"text": f"common{i}", "label": "rare"} for i in range(20))]
    data = write_rows(tmp_path / "data.jsonl", rows)
    arguments = command.with_(data=data).spec_arguments("task.data.distil=3")
    message = run("check", *arguments).complaint()
    assert "label 'rare' occurs in the search split but never in distil" in message
    assert "task.data.distil" in message


def test_too_few_examples(run: Run, command: Command, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", sentences(30))
    message = run("check", *command.with_(data=data).spec_arguments()).complaint()
    assert "30" in message


def changed_model(command: Command, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(command.model, path)
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_an_unknown_layout(run: Run, command: Command, tmp_path: Path) -> None:
    path = changed_model(command, tmp_path / "m", lambda config: config.update(model_type="xyz"))
    message = run("check", *command.with_(model=path).spec_arguments()).complaint()
    assert "xyz" in message
    assert "encoder.layer.{i}.attention.self.query.weight" in message  # what was not recognised
    assert "layouts" in message  # how to add it


def test_weights_that_are_not_safetensors(run: Run, command: Command, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(command.model, path)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    message = run("check", *command.with_(model=path).spec_arguments()).complaint()
    assert "safetensors only" in message
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_weights_cut_off(run: Run, command: Command, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(command.model, path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-1000])
    message = run("check", *command.with_(model=path).spec_arguments()).complaint()
    assert "cut off" in message


def test_weights_with_nan(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(command.model, path)
    tensors = load_file(path / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][3, 5] = float("nan")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    study = tmp_path / "study"
    teachers = stamps(command.cache / "teachers")
    message = command.with_(model=path).search(study, options=("--quiet",)).complaint()
    assert f"{path}: bert.{name} holds NaN" in message
    assert stamps(command.cache / "teachers") == teachers


def test_a_budget_out_of_reach_by_size(run: Run, command: Command) -> None:
    arguments = command.spec_arguments("budget.size=2%")
    ended = run("check", *arguments)
    assert ended.status == 3
    assert "No candidate meets size" in " ".join(ended.out.split())
    report = run("check", *arguments, "--json")
    assert report.status == 3
    assert not report.json["reachable"]
    smallest = report.json["smallest_size_bytes"]
    (problem,) = report.json["problems"]
    assert f"the smallest in this space is {smallest / 1e3:.1f} kB" in problem
    allowed = command.spec_arguments(f"budget.size={smallest + 1000} B")
    assert run("check", *allowed).status == 0


def test_a_budget_out_of_reach_by_latency(command: Command, cut_back: Callable[..., Path]) -> None:
    study = cut_back("score", "screen")
    before = stamps(study, "artifacts/**/*")
    message = command.search(
        study, "budget.latency=1%", options=("--quiet", "--fork", str(study.parent / "other"))
    ).complaint(3)
    assert "No candidate meets latency" in message
    assert "the smallest in this space is" in message
    assert stamps(study, "artifacts/**/*") == before


def test_a_directory_that_holds_another_study(run: Run, command: Command, finished: Path) -> None:
    def kept() -> dict[str, tuple[int, int]]:
        return {name: stamp for name, stamp in stamps(finished).items() if name != "lease"}

    before = kept()
    arguments = command.spec_arguments("search.seed=1", "budget.size=50%")
    message = run("search", *arguments, "--study", finished, "--quiet").complaint()
    assert "of another spec" in message
    assert "search.seed: 0 → 1" in message
    assert "budget.size: '60%' → '50%'" in message
    assert kept() == before


def test_a_directory_that_is_no_study(run: Run, command: Command, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    arguments = command.spec_arguments()
    message = run("search", *arguments, "--study", tmp_path, "--quiet").complaint()
    assert "thesis.tex" in message
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert "not empty" in message
