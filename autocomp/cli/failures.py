"""How a command ends: exit status and what is said on stderr.

0 success · 2 the user's input is wrong · 3 no candidate can meet the budget · 4 something of ours
failed (the traceback is in a log file, its path on stderr) · 130 stopped by Ctrl-C · 141 the reader
of stdout went away. With `--json` the message on stderr is `{"error": {"type", "message",
"exit_status", "log"}}`, with `nearest` and `binding` where no measured trial fits; stdout stays
empty.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import click

from autocomp.cli.output import ReaderGoneError
from autocomp.core.errors import AutocompError, InternalError

INTERRUPTED = 130
BROKEN_PIPE = 141


def run(action: Callable[[], object], arguments: Sequence[str]) -> int:
    """Run a parsed command line; the process's exit status. Only SystemExit passes through."""
    try:
        result = action()
    except click.UsageError as error:
        if _json(arguments):
            return _say(arguments, "UsageError", error.format_message(), 2)
        error.show()
        return 2
    except click.ClickException as error:
        return _say(arguments, type(error).__name__, error.format_message(), 2)
    except (KeyboardInterrupt, click.Abort):
        _say(arguments, "Interrupted", _stopped(arguments), INTERRUPTED)
        return INTERRUPTED
    except (ReaderGoneError, BrokenPipeError):
        _abandon_stdout()
        return BROKEN_PIPE
    except InternalError as error:
        log = _write_log(arguments)
        return _say(arguments, type(error).__name__, str(error), error.exit_status, log)
    except AutocompError as error:
        kind, status = type(error).__name__, error.exit_status
        return _say(arguments, kind, str(error), status, more=error.details())
    except Exception as error:
        log = _write_log(arguments)
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return _say(arguments, type(error).__name__, text, 4, log)
    return result if isinstance(result, int) else 0


def _json(arguments: Sequence[str]) -> bool:
    return "--json" in arguments


def _say(
    arguments: Sequence[str],
    kind: str,
    message: str,
    status: int,
    log: Path | None = None,
    more: Mapping[str, str | None] | None = None,
) -> int:
    if _json(arguments):
        error = {
            "type": kind,
            "message": message,
            "exit_status": status,
            "log": None if log is None else str(log),
            **(more or {}),
        }
        click.echo(json.dumps({"error": error}, ensure_ascii=False), err=True)
        return status
    prefix = "" if status == INTERRUPTED else "autocomp: error: "
    click.echo(prefix + message, err=True)
    if log is not None:
        click.echo(f"The whole traceback is in {log}", err=True)
    return status


def _stopped(arguments: Sequence[str]) -> str:
    if arguments and arguments[0] == "search":
        again = shlex.join(["autocomp", *arguments])
        return f"Stopped. Everything finished is kept; continue with: {again}"
    return "Stopped."


def _abandon_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not complain."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def study_directory(arguments: Sequence[str]) -> Path | None:
    """The existing study these arguments speak of, found without parsing them all."""
    named = [
        arguments[index + 1]
        for index, word in enumerate(arguments[:-1])
        if word in ("--study", "--fork")
    ]
    named += [word.partition("=")[2] for word in arguments if word.startswith("--study=")]
    if not named and len(arguments) > 1:
        named = [arguments[1], f"runs/{Path(arguments[1]).stem}"]
    found = (Path(name) for name in named)
    return next((path for path in found if (path / "study.json").is_file()), None)


def _write_log(arguments: Sequence[str]) -> Path:
    """Append the current traceback to the study's log.txt, or to a new temporary file."""
    text = (
        f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(['autocomp', *arguments])}\n"
        f"{traceback.format_exc()}"
    )
    study = study_directory(arguments)
    if study is not None:
        path = study / "log.txt"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
            return path
        except OSError:
            pass
    handle, name = tempfile.mkstemp(prefix="autocomp-error-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    return Path(name)
