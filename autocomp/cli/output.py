"""Where output goes: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

import click
from rich.console import Console

_PIPED_WIDTH = 120


class ReaderGoneError(Exception):
    """Who read our stdout (`head`, a pager) has closed it."""


class _Results(Console):
    def on_broken_pipe(self) -> None:
        """Rich would exit with status 1."""
        raise ReaderGoneError


def stdout_console() -> Console:
    """For results. Wide where there is no terminal, so that nothing is cut in a file."""
    return _Results(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)


def stderr_console() -> Console:
    """For progress."""
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout; not-a-number is an error, never printed."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        click.echo(text)
    except BrokenPipeError:
        raise ReaderGoneError from None
