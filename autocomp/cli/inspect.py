"""`autocomp check`, `profile`, `ls`: look at a spec, a target, what is available."""

from __future__ import annotations

from pathlib import Path

import click

from autocomp.cli.output import print_json, stderr_console, stdout_console

KINDS = ("operators", "mixers", "losses", "targets", "tasks", "exporters")

_SPEC = click.argument("spec", type=click.Path(path_type=Path))
_SET = click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Replace a setting of the spec: --set search.trials=4.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@_SPEC
@_SET
@_JSON
def check(spec: Path, settings: tuple[str, ...], as_json: bool) -> int:
    """Check SPEC: units matched, size of the space, whether the budget is within reach.

    Takes seconds and runs no model. Exit status 2 if the spec has problems, 3 if no
    candidate can meet the budget.
    """
    from autocomp import api
    from autocomp.spec.loader import parse_overrides

    report = api.check(spec, parse_overrides(settings)).to_json()
    if as_json:
        print_json(report)
    else:
        from autocomp.report.tables import print_check

        print_check(stdout_console(), report, str(spec))
    if report.get("reachable") is False:
        return 3
    return 2 if report.get("problems") else 0


@click.command()
@_SPEC
@_SET
@click.option("--quiet", is_flag=True, help="Show no progress.")
@_JSON
def profile(spec: Path, settings: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Measure the target of SPEC: what each option costs, and how well costs add up."""
    from autocomp.cli.interrupts import stoppable
    from autocomp.report.live import open_view
    from autocomp.spec.loader import parse_overrides

    overrides = parse_overrides(settings)

    with open_view(stderr_console(), quiet=quiet, study=str(spec)) as progress:
        from autocomp import api

        table = api.profile(spec, overrides=overrides, progress=stoppable(progress))
    if as_json:
        print_json(table)
    else:
        from autocomp.report.profile_table import print_profile

        print_profile(stdout_console(), table)


@click.command()
@click.argument("kind", type=click.Choice(KINDS))
@_JSON
def ls(kind: str, as_json: bool) -> None:
    """List operators, mixers, losses, targets, tasks or exporters, also those of other packages."""
    from autocomp import api

    rows = api.list_kind(kind)
    if as_json:
        print_json(rows)
    else:
        from autocomp.report.tables import print_kind

        print_kind(stdout_console(), rows)
