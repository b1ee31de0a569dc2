"""The exception tree. Every error says what, where, what is allowed and what to try next.

AutocompError
├── UserError           exit 2: the user's input is wrong (spec, path, data, flag)
│   ├── SpecError           a spec file; carries file:line
│   ├── DataError           the task's data
│   ├── ModelError          a model source or layout
│   └── StudyError          a study directory (another spec, a held lease, not a study)
├── InfeasibleError     exit 3: no candidate can meet the budget
└── InternalError       exit 4: something of ours, or of the machine, failed
    └── MachineError        memory ran out, a process was killed
        └── StorageError        disk full, a file system that refuses
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class AutocompError(Exception):
    """Base of every error a user may see. `exit_status` is the process status the CLI ends with."""

    exit_status = 4

    def details(self) -> Mapping[str, str | None]:
        """What `--json` says beside the message."""
        return {}


class UserError(AutocompError):
    """The user's input is wrong; the message says where and what is allowed."""

    exit_status = 2


class SpecError(UserError):
    """A spec file is wrong. The message starts with `file:line`."""


class DataError(UserError):
    """The task's data is missing, malformed or too small."""


class ModelError(UserError):
    """The model source cannot be used."""


class StudyError(UserError):
    """The study directory cannot be used."""


class InfeasibleError(AutocompError):
    """No candidate can meet the budget; the message names what binds and what to relax."""

    exit_status = 3


class InternalError(AutocompError):
    """Something of ours failed."""


class MachineError(InternalError):
    """The machine failed, not the work: the same may succeed another time."""


class StorageError(MachineError):
    """The disk is full or refuses; what was already stored stays valid."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest known word, or an empty string."""
    by_fold = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), by_fold, n=1)
    return f" Did you mean {by_fold[close[0]]!r}?" if close else ""
