"""The contract of an export format, as tests. Needs pytest.

    from autocomp.testing.exporter_contract import ExporterContract

    class TestMyExporter(ExporterContract):
        @pytest.fixture
        def exporter(self):
            return MY_EXPORTER

        @pytest.fixture
        def trial(self):
            return ExportRequest(...)

        @pytest.fixture
        def target(self):
            return make_target(spec.target)

The trial is one that the format can express: a finished one of a small search will do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from autocomp.core.errors import AutocompError, InternalError, UserError
from autocomp.export.protocol import Exporter, ExportRequest
from autocomp.targets.protocol import Target

LARGEST_DIFFERENCE = 1e-2
"""Of logits; formats state their own limit, which `verify` holds them to."""


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below, by its path."""
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


class ExporterContract:
    """What holds for every exporter."""

    @pytest.fixture
    def exporter(self) -> Exporter:
        """The exporter under test."""
        raise NotImplementedError("give the fixture `exporter`")

    @pytest.fixture
    def trial(self) -> ExportRequest:
        """A trial that the format can express."""
        raise NotImplementedError("give the fixture `trial`")

    @pytest.fixture
    def target(self) -> Target:
        """The target the trial was measured on."""
        raise NotImplementedError("give the fixture `target`")

    def test_it_says_what_it_is(self, exporter: Exporter, trial: ExportRequest) -> None:
        assert exporter.name
        assert exporter.summary.endswith(".")
        assert exporter.expresses
        assert exporter.supports(trial.record) is None

    def test_a_trial_without_a_model_is_refused(
        self, exporter: Exporter, trial: ExportRequest, tmp_path: Path
    ) -> None:
        record = replace(trial.record, artifact=None)
        reason = exporter.supports(record)
        assert reason
        with pytest.raises(UserError) as caught:
            exporter.write(replace(trial, record=record), tmp_path / "empty" / "out")
        assert reason in str(caught.value)
        assert not (tmp_path / "empty" / "out").exists()

    def test_a_directory_holds_the_model_and_what_is_needed_to_use_it(
        self, exporter: Exporter, trial: ExportRequest, tmp_path: Path
    ) -> None:
        out = tmp_path / "deep" / "out"
        exporter.write(trial, out)
        assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing is left beside it"
        files = contents(out)
        assert "```python" in files["README.md"].decode(), "the card says how to load it"
        assert yaml.safe_load(files["candidate.yaml"]) == trial.record.candidate.to_json()
        shipped = {file.name for file in trial.companions.files()} - {"preprocessor_config.json"}
        assert shipped <= set(files)
        labels = trial.companions.label_names
        assert files.get("labels.txt", b"").decode().split("\n")[:-1] == list(labels)

    def test_the_same_trial_gives_the_same_files(
        self, exporter: Exporter, trial: ExportRequest, tmp_path: Path
    ) -> None:
        for name in ("one", "other"):
            exporter.write(trial, tmp_path / name)
        assert contents(tmp_path / "one") == contents(tmp_path / "other")

    def test_what_is_there_stays(
        self, exporter: Exporter, trial: ExportRequest, tmp_path: Path
    ) -> None:
        (tmp_path / "new").mkdir()
        exporter.write(trial, tmp_path / "new")  # an empty one is as good as none
        before = contents(tmp_path / "new")
        with pytest.raises(UserError, match="is not empty"):
            exporter.write(trial, tmp_path / "new")
        assert contents(tmp_path / "new") == before
        (tmp_path / "file").write_text("mine")
        for place in (tmp_path / "file", tmp_path / "file" / "out"):
            with pytest.raises(AutocompError):
                exporter.write(trial, place)
        assert (tmp_path / "file").read_text() == "mine"

    def test_it_is_verified_and_damage_is_found(
        self, exporter: Exporter, trial: ExportRequest, target: Target, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        exporter.write(trial, out)
        found = exporter.verify(trial, out, target)
        assert 0 <= found.max_difference < LARGEST_DIFFERENCE
        assert 0 < found.size_bytes <= sum(map(len, contents(out).values()))
        assert found.measured is None or found.measured.provenance == "measured"
        beside = {"README.md", "candidate.yaml", *(file.name for file in trial.companions.files())}
        model = [file for file in out.iterdir() if file.name not in beside]
        largest = max(model, key=lambda file: file.stat().st_size)
        whole = largest.read_bytes()
        largest.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InternalError):
            exporter.verify(trial, out, target)
