"""The command line over a made-up api: what is passed on, what is printed, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import autocomp
from autocomp.api import listing
from autocomp.cli import inspect
from autocomp.cli.main import cli
from autocomp.cli.values import Duration
from autocomp.core.errors import InfeasibleError, SpecError, StorageError, StudyError
from autocomp.front.pick import NothingFitsError

TRIAL: dict[str, Any] = {
    "id": "6fc4fb7607",
    "kind": "search",
    "proposed_by": "milp",
    "state": "complete",
    "on_front": True,
    "feasible": True,
    "quality": 0.9,
    "teacher_kl": 0.03,
    "latency_ms": 1.2,
    "size_bytes": 9_000_000,
    "peak_memory_bytes": None,
    "measured": True,
    "estimated": {"latency_ms": 1.1, "size_bytes": 9_000_000, "peak_memory_bytes": None},
    "candidate": {"units": {"layers.0.ffn": {"skip": {}}}, "distillation": {"tokens": 0}},
}
FRONT: dict[str, Any] = {
    "study": "runs/tiny",
    "target": {"name": "onnxruntime-cpu"},
    "budget": {"latency_ms": 1.3, "size_bytes": None, "peak_memory_bytes": None},
    "dense": None,
    "chosen": "6fc4fb7607",
    "hypervolume": 0.5,
    "trials": [TRIAL],
}

PROFILE: dict[str, Any] = {  # as `api.profile` gives it; tests/report/test_profile_table.py
    "target": {"target": "onnxruntime-cpu", "workload": {"batch": 1, "threads": 1}},
    "estimated": {
        "error": 0.02,
        "dense": {"latency_ms": 1.0, "size_bytes": 1000},
        "smallest": {"latency_ms": 0.5, "size_bytes": 500},
    },
    "units": {"layers.0.ffn": {"dense": {"latency_ms": 0.5, "size_bytes": 900}}},
}


class FakePicked:
    def to_json(self) -> dict[str, Any]:
        return TRIAL

    def export(self, directory: Path, format: str | None = None) -> dict[str, Any]:
        return {"directory": str(directory), "verified": True, "format": format}


class FakeStudy:
    def __init__(self, calls: list[tuple[str, Any]], view: dict[str, Any] = FRONT) -> None:
        self.calls, self.view = calls, view

    def front(self, against: Path | None = None) -> dict[str, Any]:
        if against is None:
            return self.view
        other = {"study": str(against), "hypervolume": 0.5, "ratio": 1.2, "covers": 0.5}
        return {**FRONT, "against": {**other, "covered": 0.25}}

    def pick(self, **limits: Any) -> FakePicked:
        self.calls.append(("pick", limits))
        return FakePicked()


class FakeReport:
    def __init__(self, **changes: Any) -> None:
        self.data = {"rules": [], "units": [], "space_log10": 12.0, "problems": [], **changes}

    def to_json(self) -> dict[str, Any]:
        return self.data


class FakeApi(ModuleType):
    """Stands in for `autocomp.api`. `error` is raised, `report` returned, when set."""

    def __init__(self) -> None:
        super().__init__("autocomp.api")
        self.calls: list[tuple[str, Any]] = []
        self.error: BaseException | None = None
        self.report = FakeReport()
        self.front = FRONT

    def _call(self, name: str, *details: Any) -> None:
        self.calls.append((name, *details))
        if self.error is not None and not self._only_of_searching(name):
            raise self.error

    def _only_of_searching(self, name: str) -> bool:
        """The study of a search in which nothing fits can be opened."""
        return isinstance(self.error, NothingFitsError) and name != "search"

    def check(self, spec: Path, overrides: dict[str, Any]) -> FakeReport:
        self._call("check", spec, overrides)
        return self.report

    def search(self, spec: Path, **options: Any) -> FakeStudy:
        progress = options.pop("progress")
        progress.phase("teacher", 2)
        progress.advance(1)
        self._call("search", spec, options)
        return FakeStudy(self.calls)

    def open_study(self, path: Path) -> FakeStudy:
        self._call("open_study", path)
        return FakeStudy(self.calls, self.front)

    def profile(self, spec: Path, **options: Any) -> dict[str, Any]:
        self._call("profile", spec, options["overrides"])
        return PROFILE

    def list_kind(self, kind: str) -> list[dict[str, Any]]:
        self._call("list_kind", kind)
        return [
            {
                "name": "gptq",
                "summary": "Rounds.",
                "paper": "2210.17323",
                "options": "weights",
                "speeds_up": [],
                "shrinks": ["onnxruntime-cpu"],
            }
        ]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi()
    monkeypatch.setitem(sys.modules, "autocomp.api", fake)
    monkeypatch.setattr(autocomp, "api", fake, raising=False)
    return fake


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


class TestSearch:
    def test_everything_is_passed_on(self, api: FakeApi) -> None:
        result = run(
            "search", "specs/tiny.yaml", "--study", "here", "--workers", "2", "--ray", "ray://x:1",
            "--time", "1h30m", "--trials", "4", "--screen", "50", "--set", "search.seed=3",
            "--set", "budget.latency=25%", "--tracking-uri", "http://m", "--fork", "there",
            "--quiet",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert api.calls == [
            (
                "search",
                Path("specs/tiny.yaml"),
                {
                    "study": Path("here"),
                    "workers": 2,
                    "ray_address": "ray://x:1",
                    "time_limit_s": 5400.0,
                    "trials": 4,
                    "screen": 50,
                    "overrides": {"search.seed": 3, "budget.latency": "25%"},
                    "tracking_uri": "http://m",
                    "fork": Path("there"),
                },
            )
        ]

    def test_the_study_is_named_after_the_spec(self, api: FakeApi) -> None:
        run("search", "specs/tiny.yaml", "--quiet")
        assert api.calls[0][2]["study"] == Path("runs/tiny")
        assert "fork" not in api.calls[0][2]

    def test_progress_on_stderr_and_the_front_on_stdout(self, api: FakeApi) -> None:
        result = run("search", "tiny.yaml")
        assert "teacher: started" in result.stderr
        assert "teacher" not in result.stdout
        assert result.stdout.endswith("  autocomp pick runs/tiny --export out/\n")

    def test_quiet(self, api: FakeApi) -> None:
        assert run("search", "tiny.yaml", "--quiet").stderr == ""

    def test_where_nothing_fits_the_front_stands_above_the_message(self, api: FakeApi) -> None:
        api.error = NothingFitsError("No measured trial meets it. Nearest: x", None, "size_bytes")
        api.front = {**FRONT, "chosen": None, "nearest": None}
        result = run("search", "tiny.yaml", "--quiet", "--fork", "there")
        assert result.exit_code == 3
        assert api.calls[1:] == [("open_study", Path("there"))]
        assert "6fc4fb7607" in result.stdout
        assert "No measured model meets the budget." in result.stdout
        assert result.stderr == "autocomp: error: No measured trial meets it. Nearest: x\n"
        result = run("search", "tiny.yaml", "--quiet", "--json")
        assert (result.exit_code, result.stdout) == (3, "")

    def test_json(self, api: FakeApi) -> None:
        assert json.loads(run("search", "tiny.yaml", "--json").stdout) == FRONT


class TestFront:
    def test_table(self, api: FakeApi) -> None:
        result = run("front", "runs/tiny")
        assert result.exit_code == 0
        assert api.calls == [("open_study", Path("runs/tiny"))]
        assert "6fc4fb7607" in result.stdout

    def test_against_another_study(self, api: FakeApi, tmp_path: Path) -> None:
        result = run("front", "runs/x", "--against", str(tmp_path))
        assert result.exit_code == 0, result.stderr
        said = " ".join(result.stdout.split())
        assert "1.200 of its hypervolume (0.5)" in said
        assert "covers 50% of that one's trials, that one 25% of these" in said

    def test_json_is_the_view_itself(self, api: FakeApi) -> None:
        assert json.loads(run("front", "runs/tiny", "--json").stdout) == FRONT

    def test_html(self, api: FakeApi, tmp_path: Path) -> None:
        page = tmp_path / "deep" / "front.html"
        result = run("front", "runs/tiny", "--html", str(page))
        assert result.exit_code == 0, result.output
        assert page.read_text().startswith("<!DOCTYPE html>")
        assert str(page) in result.stderr
        assert result.stdout == ""


class TestPick:
    def test_limits_are_passed_on_as_written(self, api: FakeApi) -> None:
        result = run(
            "pick", "runs/tiny", "--latency", "35%", "--size", "12 MB", "--peak-memory", "1 GiB",
            "--quality", "98%", "--json",
        )  # fmt: skip
        limits = {"latency": "35%", "size": "12 MB", "peak_memory": "1 GiB", "quality": "98%"}
        assert api.calls[1] == ("pick", {**limits, "best": False, "least": None})
        assert json.loads(result.stdout) == {**TRIAL, "export": None}

    def test_the_plain_best_is_asked_for_and_stays_asked_for(self, api: FakeApi) -> None:
        result = run("pick", "runs/tiny", "--best")
        assert api.calls[1][1]["best"] is True
        assert "  autocomp pick runs/tiny --best --export out/\n" in result.stdout

    def test_what_costs_least_is_asked_for_and_stays_asked_for(self, api: FakeApi) -> None:
        result = run("pick", "runs/tiny", "--quality", "98%", "--least", "peak-memory")
        assert api.calls[1][1]["least"] == "peak_memory"
        command = 'autocomp pick runs/tiny --quality "98%" --least "peak-memory" --export out/'
        assert f"  {command}\n" in result.stdout
        result = run("pick", "runs/tiny", "--quality", "good")
        assert result.exit_code == 2
        assert "'good' is no floor on quality" in result.stderr

    def test_export(self, api: FakeApi) -> None:
        result = run("pick", "runs/tiny", "--export", "out", "--json")
        assert json.loads(result.stdout)["export"] == {
            "directory": "out",
            "verified": True,
            "format": None,
        }
        result = run("pick", "runs/tiny", "--export", "out", "--json", "--format", "huggingface")
        assert json.loads(result.stdout)["export"]["format"] == "huggingface"
        assert "Exported and verified: out" in run("pick", "runs/tiny", "--export", "out").stdout

    def test_formats(self, api: FakeApi) -> None:
        result = run("pick", "runs/tiny", "--export", "out", "--format", "hugginface")
        assert result.exit_code == 2
        assert "Did you mean 'huggingface'?" in result.stderr
        assert "compressed-tensors, huggingface, onnx, openvino" in result.stderr
        result = run("pick", "runs/tiny", "--format", "onnx")
        assert result.exit_code == 2
        assert "--export DIR" in result.stderr
        assert api.calls == []

    def test_the_next_command_repeats_the_limits(self, api: FakeApi) -> None:
        result = run("pick", "runs/tiny", "--latency", "4 ms")
        assert '  autocomp pick runs/tiny --latency "4 ms" --export out/\n' in result.stdout

    @pytest.mark.parametrize("bad", ["4 parsecs", "-1 ms", "0%"])
    def test_a_limit_that_is_none(self, api: FakeApi, bad: str) -> None:
        result = run("pick", "runs/tiny", f"--latency={bad}")
        assert result.exit_code == 2
        assert "latency" in result.stderr
        assert api.calls == []


class TestInspect:
    def test_check(self, api: FakeApi) -> None:
        result = run("check", "s.yaml", "--set", "search.trials=2")
        assert result.exit_code == 0
        assert api.calls == [("check", Path("s.yaml"), {"search.trials": 2})]
        assert "10^12.0 candidates" in result.stdout

    def test_check_with_problems(self, api: FakeApi) -> None:
        api.report = FakeReport(problems=["space[1] matches no unit"])
        result = run("check", "s.yaml")
        assert result.exit_code == 2
        assert "space[1] matches no unit" in result.stdout
        result = run("check", "s.yaml", "--json")
        assert result.exit_code == 2
        assert json.loads(result.stdout)["problems"] == ["space[1] matches no unit"]

    def test_check_of_a_budget_out_of_reach(self, api: FakeApi) -> None:
        api.report = FakeReport(reachable=False, problems=["the smallest is 7.9 MB"])
        assert run("check", "s.yaml").exit_code == 3

    def test_profile(self, api: FakeApi) -> None:
        result = run("profile", "s.yaml", "--json", "--quiet")
        assert json.loads(result.stdout) == PROFILE
        assert "layers.0.ffn  dense" in run("profile", "s.yaml", "--quiet").stdout

    def test_ls(self, api: FakeApi) -> None:
        assert json.loads(run("ls", "operators", "--json").stdout)[0]["name"] == "gptq"
        assert "shrinks: onnxruntime-cpu" in run("ls", "operators").stdout
        assert json.loads(run("ls", "mixers", "--json").stdout)
        assert run("ls", "planets").exit_code == 2
        assert inspect.KINDS == listing.KINDS


class TestEnds:
    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (SpecError("s.yaml:3: no"), 2),
            (StudyError("held"), 2),
            (InfeasibleError("size binds"), 3),
        ],
    )
    def test_our_errors_are_one_message(self, api: FakeApi, error: Exception, status: int) -> None:
        api.error = error
        result = run("front", "runs/tiny")
        assert result.exit_code == status
        assert result.stderr == f"autocomp: error: {error}\n"
        assert result.stdout == ""

    def test_as_json(self, api: FakeApi) -> None:
        api.error = InfeasibleError("size binds")
        result = run("front", "runs/tiny", "--json")
        assert result.exit_code == 3
        assert result.stdout == ""
        assert json.loads(result.stderr) == {
            "error": {
                "type": "InfeasibleError",
                "message": "size binds",
                "exit_status": 3,
                "log": None,
            }
        }

    @pytest.mark.parametrize("error", [ValueError("what?"), StorageError("the disk is full")])
    def test_a_failure_of_ours_leaves_a_log(
        self, api: FakeApi, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        study = tmp_path / "runs" / "tiny"
        study.mkdir(parents=True)
        (study / "study.json").write_text("{}")
        api.error = error
        for command in (("search", "specs/tiny.yaml", "--quiet"), ("front", "runs/tiny")):
            result = run(*command)
            assert result.exit_code == 4
            assert str(error) in result.stderr
            assert "Traceback" not in result.stderr
            assert str(Path("runs/tiny/log.txt")) in result.stderr
        log = (study / "log.txt").read_text()
        assert log.count("Traceback") == 2
        assert "autocomp search specs/tiny.yaml --quiet" in log

    def test_without_a_study_the_log_is_elsewhere(
        self, api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        api.error = RuntimeError("boom")
        result = run("ls", "tasks", "--json")
        error = json.loads(result.stderr)["error"]
        assert (result.exit_code, error["exit_status"]) == (4, 4)
        assert "boom" in Path(error["log"]).read_text()

    def test_ctrl_c_says_how_to_continue(self, api: FakeApi) -> None:
        api.error = KeyboardInterrupt()
        result = run("search", "my specs/tiny.yaml", "--quiet", "--trials", "3")
        assert result.exit_code == 130
        assert (
            "Stopped. Everything finished is kept; continue with: "
            "autocomp search 'my specs/tiny.yaml' --quiet --trials 3" in result.stderr
        )
        assert "error" not in result.stderr

    def test_usage_errors(self, api: FakeApi) -> None:
        result = run("serch")
        assert result.exit_code == 2
        assert "serch" in result.stderr
        result = run("search", "s.yaml", "--trials", "many", "--json")
        assert result.exit_code == 2
        assert json.loads(result.stderr)["error"]["type"] == "UsageError"
        result = run("search", "s.yaml", "--set", "novalue", "--quiet")
        assert result.exit_code == 2
        assert "--set search.trials=3" in result.stderr

    def test_help_of_every_command(self) -> None:
        for name in ("check", "search", "front", "pick", "profile", "ls", "dashboard"):
            result = run(name, "--help")
            assert result.exit_code == 0
            assert "--json" in result.stdout
        assert "130 stopped" in " ".join(run("--help").stdout.split())
        assert autocomp.__version__ in run("--version").stdout


class TestProcess:
    """What only a process of its own shows."""

    def test_help_is_quick_because_it_imports_little(self) -> None:
        code = (
            "import sys\n"
            "from autocomp.cli.main import cli\n"
            "try:\n    cli.main(['--help'])\n"
            "except SystemExit as end:\n    assert end.code == 0\n"
            "heavy = {'torch', 'transformers', 'ray', 'mlflow', 'onnxruntime', 'optuna', 'scipy',\n"
            "         'pydantic', 'numpy'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

    @pytest.mark.parametrize("form", [(), ("--json",)])
    def test_a_reader_that_goes_away(self, form: tuple[str, ...]) -> None:
        code = (
            "import sys, types\n"
            "import autocomp\n"
            "api = types.ModuleType('autocomp.api')\n"
            "api.list_kind = lambda kind: [{'name': 'x' * 80, 'summary': 's'}] * 20000\n"
            "sys.modules['autocomp.api'] = autocomp.api = api\n"
            "from autocomp.cli.main import main\n"
            "main()\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, "ls", "tasks", *form],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        with process.stderr:
            process.stdout.read(10)
            process.stdout.close()
            status = process.wait(30)
            assert process.stderr.read() == b""
        # A single large write to a closed pipe is not always reported to the writer.
        assert status in ((0, 141) if form else (141,))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("20m", 1200), ("1h30m", 5400), ("0.5h", 1800), ("1H 1m 1s", 3661)],
)
def test_durations(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "0", "soon", "-3m", "1h30", "5d"])
def test_no_durations(text: str) -> None:
    with pytest.raises(click.BadParameter, match="write 90s, 20m or 1h30m"):
        Duration().convert(text, None, None)
