"""The `autocomp` command. `autocomp.api` and everything heavy is imported inside the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from autocomp import __version__
from autocomp.cli.failures import run
from autocomp.cli.inspect import check, ls, profile
from autocomp.cli.interrupts import listen
from autocomp.cli.search import search
from autocomp.cli.study import dashboard, front, pick


class Program(click.Group):
    """A group that ends as `autocomp.cli.failures` says, and lists commands in order of use."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Parse, run, exit."""
        arguments = list(sys.argv[1:] if args is None else args)
        parse = super().main

        def action() -> object:
            return parse(
                arguments,
                prog_name or "autocomp",
                complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **extra,
            )

        sys.exit(run(action, arguments))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order they were added."""
        return list(self.commands)


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 success, 2 wrong input, 3 no candidate can meet the budget, 4 something "
    "of ours or of the machine failed (see the log named on stderr), 130 stopped, 141 the reader "
    "of stdout left. With --json, results are JSON on stdout and errors are "
    '{"error": {...}} on stderr.',
)
@click.version_option(__version__, prog_name="autocomp")
def cli() -> None:
    """State a hardware budget, get a compressed transformer back."""


for command in (check, search, front, pick, profile, ls, dashboard):
    cli.add_command(command)


def main() -> NoReturn:
    """The console entry point."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    listen()
    cli.main()
    raise SystemExit(0)


if __name__ == "__main__":
    main()
