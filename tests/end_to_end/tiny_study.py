"""A study of seconds: a random BERT, separable sentences, and the command line to run them with."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "search_spaces" / "tiny.yaml"
TOPICS = ("weather", "sport", "money")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SHARED = tuple(f"common{i}" for i in range(160))
WORDS = {topic: tuple(f"{topic}{i}" for i in range(12)) for topic in TOPICS}
VOCABULARY = (*SPECIAL, *SHARED, *(word for topic in TOPICS for word in WORDS[topic]))
SETTINGS = (
    "task.teacher.epochs=6",
    "task.teacher.lr=3.0e-3",
    "task.data.distil=96",
    "budget.latency=200%",
)
"""Fitting enough for a random model to learn the topics, where the spec suits a pretrained one; and
a latency that a run of 60 µs also keeps on a busy host."""


def write_model(path: Path) -> Path:
    """A random BERT without a head (2 layers, hidden 64, vocabulary 200), with its tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(path)
    words = models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(path)
    return path


def sentences(count: int = 360, seed: int = 0) -> list[dict[str, str]]:
    """Labelled sentences; a few words of the topic among common ones."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        topic = TOPICS[index % len(TOPICS)]
        words = draw.choices(WORDS[topic], k=5) + draw.choices(SHARED, k=draw.randint(1, 7))
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": topic})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Ended:
    """A finished command."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed."""
        return json.loads(self.out)

    def complaint(self, status: int = 2) -> str:
        """The message of a command that refused its input: one, on stderr, no traceback."""
        assert self.status == status, f"exit {self.status}: {self.out}\n{self.err}"
        assert "Traceback" not in self.err
        assert self.err.count("autocomp: error: ") == 1, self.err
        assert self.out == ""
        return self.err.partition("autocomp: error: ")[2].strip()


@dataclass(frozen=True)
class Command:
    """Runs `autocomp` in processes of its own, on a model and data, with a cache."""

    model: Path
    data: Path
    cache: Path
    directory: Path

    def with_(self, **changes: Path) -> Command:
        """The same with another model, data or cache."""
        return replace(self, **changes)

    @property
    def environment(self) -> dict[str, str]:
        """Offline, one thread a process, this checkout."""
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        return {
            **os.environ,
            "PYTHONPATH": path,
            "AUTOCOMP_CACHE": str(self.cache),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
        }

    def spec_arguments(self, *settings: str) -> list[str]:
        """The spec and what is put over it."""
        given = (
            f"model.source={self.model}",
            f"task.data.source={self.data}",
            *SETTINGS,
            *settings,
        )
        return [str(SPEC), *(word for setting in given for word in ("--set", setting))]

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start a command in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "autocomp.cli.main", *map(str, arguments)],
            cwd=self.directory,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str | Path, timeout_s: float = 400) -> Ended:
        """Run a command to its end."""
        with ended_with(self.start(*arguments)) as process:
            out, err = process.communicate(timeout=timeout_s)
        return Ended(process.returncode, out, err)

    def search(self, study: Path, *settings: str, options: tuple[str, ...] = ()) -> Ended:
        """`autocomp search`, quiet."""
        return self.run("search", *self.spec_arguments(*settings), "--study", study, *options)


@contextmanager
def ended_with(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Whatever happens in the block, the process and its group are gone after it."""
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 400
) -> None:
    """Poll until `condition` holds while the process runs."""
    limit = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None:
            out, err = process.communicate()
            raise AssertionError(f"ended with {process.returncode} too early:\n{out}\n{err}")
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.02)


def ledger(study: Path) -> list[dict[str, Any]]:
    """Every whole line of a study's ledger."""
    path = study / "ledger.jsonl"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def keys(study: Path, kind: str) -> list[str]:
    """The keys of the ledger's entries of one kind, as often as they are there."""
    return [entry["key"] for entry in ledger(study) if entry["kind"] == kind]


def stamps(directory: Path, pattern: str = "**/*") -> dict[str, tuple[int, int]]:
    """File → (modification time, size), of every file below."""
    return {
        str(file.relative_to(directory)): (file.stat().st_mtime_ns, file.stat().st_size)
        for file in directory.glob(pattern)
        if file.is_file()
    }
