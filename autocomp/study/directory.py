"""A study on disk: what is where, who may write, and what the ledger says about its trials.

    runs/quickstart/
        study.json       format, name, key of the spec, date, library versions, devices
        spec.yaml        the spec, defaults written out
        ledger.jsonl     the truth: trials, scores, screenings (study/ledger.py)
        lease            held by the one controller
        gate             measuring excludes working (core/gate.py)
        cost_table.json  (cost_table.RUNTIME.json where the study has a choice of runtimes)
        per_example/     each trial's score on each example (study/per_example.py)
        artifacts/  companions/  students/  work/  ray/  log.txt  mlflow.db  front.html

Call sequence of a controller: `Study.create_or_open(path, spec)`, then `with study.lease():`
everything that writes. Anyone else: `Study.open(path)`, reading only. Workers get `study.ledger`.
"""

from __future__ import annotations

import json
import logging
import platform
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from autocomp.core.candidate import Runtime
from autocomp.core.errors import StudyError, did_you_mean
from autocomp.core.files import storage_error, sweep_temporaries, write_text_atomic
from autocomp.spec.difference import dump_spec, spec_diff
from autocomp.spec.loader import load_stored_spec
from autocomp.spec.schema import Spec
from autocomp.study import lease
from autocomp.study.ledger import Ledger
from autocomp.study.paths import StudyPaths
from autocomp.study.records import TrialRecord, dense_reference

logger = logging.getLogger(__name__)

FORMAT = 1
_LIBRARIES = ("autocomp", "torch", "transformers", "onnxruntime", "onnx", "optuna", "ray", "numpy")


@dataclass(frozen=True)
class Study:
    """A study's directory, spec and ledger. `read_only` refuses every write."""

    paths: StudyPaths
    name: str
    spec: Spec
    read_only: bool = False
    _about: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def create_or_open(cls, path: Path | str, spec: Spec, name: str | None = None) -> Study:
        """The study of `spec` at `path`, made if there is none; resumes one of the same spec.

        How long to search (`search.trials`, `search.screen`) may differ: the new amounts are kept.

        Raises:
            StudyError: if the directory holds a study of another spec (with the differences),
                something else, or a study that another process is running.
            StorageError: if the file system refuses.
        """
        paths = StudyPaths(Path(path))
        found = _contents(paths.root)
        if not paths.about.exists() and found:
            raise StudyError(
                f"{paths.root} is not empty and not a study (it holds {_some(found)}). "
                f"Name a new or empty directory"
            )
        try:
            paths.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(paths.root, error.errno, error) from error
        with lease.hold(paths.lease, f"the study {paths.root}"):
            sweep_temporaries(paths.root)
            if not paths.about.exists():
                write_text_atomic(paths.about, _json(_new_about(name or _name(paths.root), spec)))
            about = _read_about(paths)
            if paths.spec.exists():
                _check_same(paths, about, spec)
            elif about["key"] != spec.key:
                raise StudyError(f"{paths.root} was begun with another spec. Name a new directory")
            text = dump_spec(spec)
            if not paths.spec.exists() or paths.spec.read_text(encoding="utf-8") != text:
                write_text_atomic(paths.spec, text)
        return cls(paths, about["name"], spec, _about=about)

    @classmethod
    def open(cls, path: Path | str) -> Study:
        """An existing study, for reading, whether or not it is running.

        Raises:
            StudyError: if there is none; lists those inside `path`.
        """
        paths = StudyPaths(Path(path))
        if not paths.about.exists():
            raise StudyError(_no_study(paths.root))
        about = _read_about(paths)
        return cls(paths, about["name"], _stored_spec(paths), read_only=True, _about=about)

    @property
    def id(self) -> str:
        """Name and spec key, `quickstart-3f2a91c0`: tells studies of one name apart."""
        return f"{self.name}-{self.spec.key[:8]}"

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries it was made with."""
        return dict(self._about["versions"])

    @property
    def devices(self) -> list[str]:
        """Fingerprints of the devices it was measured on, first one first."""
        return list(self._about["devices"])

    def runtime_of(self, device: str) -> Runtime:
        """The runtime a device's fingerprint is of; `None` in a study without a choice."""
        runtime: Runtime = self._about.get("runtimes", {}).get(device)
        return runtime

    @cached_property
    def ledger(self) -> Ledger:
        """The study's ledger; picklable, so workers append to it themselves."""
        return Ledger(self.paths.ledger, read_only=self.read_only)

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Be the one controller.

        Raises:
            StudyError: if another live process is, with its process id.
        """
        with lease.hold(self.paths.lease, f"the study {self.paths.root}"):
            yield

    def record_device(self, fingerprint: str, runtime: Runtime = None) -> None:
        """Note the device this study is measured on; call under the lease.

        Figures of different devices do not compare: a second one is noted and warned about. A
        fingerprint is of device and runtime: one for each runtime is no second device.
        """
        if self.read_only:
            raise ValueError(f"{self.paths.root} was opened for reading only")
        devices = self.devices
        if fingerprint in devices:
            return
        earlier = [device for device in devices if self.runtime_of(device) == runtime]
        if earlier:
            logger.warning(
                "study %s was measured on %s, now on %s: latencies of the two do not compare",
                self.name,
                earlier[-1],
                fingerprint,
            )
        self._about["devices"] = [*devices, fingerprint]
        if runtime is not None:
            self._about["runtimes"] = {**self._about.get("runtimes", {}), fingerprint: runtime}
        write_text_atomic(self.paths.about, _json(self._about))

    def add_trial(self, record: TrialRecord) -> bool:
        """Write a trial to the ledger, see `append_trial`."""
        return append_trial(self.ledger, record)

    def trials(self) -> list[TrialRecord]:
        """One record for each trial id, in the order of their first entries.

        A complete record stands for good; failed or pruned attempts of the same trial are shown
        (the last one) until one completes.
        """
        by_id: dict[str, TrialRecord] = {}
        for payload in self.ledger.read().of("trial").values():
            record = TrialRecord.from_json(payload)
            kept = by_id.get(record.id)
            if kept is None or kept.state != "complete":
                by_id[record.id] = record
        return list(by_id.values())

    def failed_by_machine(self) -> list[TrialRecord]:
        """Trials that failed once, and because the machine did: worth a second attempt."""
        attempts = Counter(payload["id"] for payload in self.ledger.read().of("trial").values())
        return [
            record
            for record in self.trials()
            if record.state == "failed" and record.by_machine and attempts[record.id] == 1
        ]

    def dense(self) -> TrialRecord | None:
        """The complete trial of the dense model, which relative budgets refer to.

        That of the first runtime where there are several.
        """
        return dense_reference(trial for trial in self.trials() if trial.state == "complete")

    def reference(self, device: str) -> dict[str, Any] | None:
        """What was recorded once for a device (the anchor's latency): first measurement wins."""
        return self.ledger.read().of("reference").get(device)


def append_trial(ledger: Ledger, record: TrialRecord) -> bool:
    """Write a trial's record; `False` if that trial is already complete in the ledger.

    For workers, which hold only the ledger. A failed or pruned attempt is kept under a key of its
    own, so that a later attempt can still complete.
    """
    key = record.id
    if record.state != "complete":
        attempt = sum(k.split("#")[0] == record.id for k in ledger.read().of("trial"))
        key = f"{record.id}#{record.state}-{attempt + 1}"
    return ledger.append("trial", key, record.to_json())


def _new_about(name: str, spec: Spec) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return {
        "format": FORMAT,
        "name": name,
        "key": spec.key,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "devices": [],
    }


def _read_about(paths: StudyPaths) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads(paths.about.read_text(encoding="utf-8"))
        found = about["format"]
        missing = {"name", "key", "created", "versions", "devices"} - about.keys()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{paths.about} is unreadable ({error}); not an autocomp study") from error
    if found != FORMAT:
        raise StudyError(
            f"{paths.root} is a study of format {found}; this autocomp reads format {FORMAT}. "
            f"Use the autocomp that made it, or a new directory"
        )
    if missing:
        raise StudyError(f"{paths.about} lacks {', '.join(sorted(missing))}; not an autocomp study")
    return about


def _stored_spec(paths: StudyPaths) -> Spec:
    if not paths.spec.exists():
        raise StudyError(
            f"{paths.root}: the study was interrupted while it was made (no spec.yaml). "
            f"Start its search again"
        )
    return load_stored_spec(paths.spec)


def _check_same(paths: StudyPaths, about: dict[str, Any], spec: Spec) -> None:
    stored = _stored_spec(paths)
    if stored.key == spec.key:
        return
    amounts = ("search.trials:", "search.screen:")
    lines = [line for line in spec_diff(stored, spec) if not line.startswith(amounts)]
    raise StudyError(
        f"{paths.root} holds the study {about['name']!r} of another spec (study → this spec):\n"
        + "\n".join(f"  {line}" for line in lines)
        + "\nRestore these values to resume it, keep the changed spec's study in a directory of "
        "its own with --fork DIR, reusing what this one has built, or name a new directory"
    )


def _contents(root: Path) -> list[str]:
    """What a directory holds besides what a study interrupted at birth leaves."""
    if not root.exists():
        return []
    if not root.is_dir():
        raise StudyError(f"{root} is a file; a study is a directory")
    ours = {"lease", "log.txt"}
    names = (entry.name for entry in root.iterdir())
    return sorted(n for n in names if n not in ours and not n.startswith(".study.json."))


def _no_study(root: Path) -> str:
    if not root.exists():
        beside = [p.parent.name for p in root.parent.glob("*/study.json")]
        return (
            f"{root}: no such study.{did_you_mean(root.name, beside)} A search makes one, in "
            f"runs/ unless told: autocomp search SPEC --study {root}"
        )
    inside = sorted(str(p.parent) for p in root.glob("*/study.json")) if root.is_dir() else []
    if inside:
        return f"{root} is no study, but holds studies: {_some(inside)}. Name one of them"
    return f"{root} is no study (no study.json). Make one with: autocomp search SPEC"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _name(root: Path) -> str:
    return root.resolve().name


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2) + "\n"
