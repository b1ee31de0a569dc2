"""Where things are in a study's directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autocomp.core.candidate import Runtime


@dataclass(frozen=True)
class StudyPaths:
    """Where things are in a study's directory. Files and directories need not exist yet."""

    root: Path

    @property
    def about(self) -> Path:
        """What makes a directory a study; written first and whole."""
        return self.root / "study.json"

    @property
    def spec(self) -> Path:
        """The spec, defaults written out."""
        return self.root / "spec.yaml"

    @property
    def ledger(self) -> Path:
        """The append-only truth."""
        return self.root / "ledger.jsonl"

    @property
    def lease(self) -> Path:
        """Locked by the controller."""
        return self.root / "lease"

    @property
    def gate(self) -> Path:
        """For `core.gate.Gate`."""
        return self.root / "gate"

    def cost_table(self, runtime: Runtime = None) -> Path:
        """The sublayer costs on a runtime, named where the study has a choice of them."""
        return self.root / ("cost_table.json" if runtime is None else f"cost_table.{runtime}.json")

    @property
    def artifacts(self) -> Path:
        """One directory for each trial's exported model."""
        return self.root / "artifacts"

    def student(self, trial: str) -> Path:
        """A trial's torch weights, for other export formats; beside no artifact, in no size."""
        return self.root / "students" / f"{trial}.safetensors"

    def checkpoint(self, trial: str) -> Path:
        """Of a trial in training, as of its last rung; gone once the trial has ended."""
        return self.work / "checkpoints" / f"{trial}.safetensors"

    def per_example(self, trial: str, split: str) -> Path:
        """A trial's score on every example of a split, for `study.per_example`."""
        return self.root / "per_example" / split / f"{trial}.safetensors"

    @property
    def companions(self) -> Path:
        """What every exported model is shipped with: tokenizer or processor, labels, inputs."""
        return self.root / "companions"

    @property
    def work(self) -> Path:
        """Scratch: spilled activations, caches; safe to delete when nothing runs."""
        return self.root / "work"

    @property
    def running(self) -> Path:
        """How far each trial that runs has come, for `study.activity`."""
        return self.work / "running"

    @property
    def log(self) -> Path:
        """What happened, with tracebacks."""
        return self.root / "log.txt"

    @property
    def front_html(self) -> Path:
        """The self-contained front page."""
        return self.root / "front.html"
