"""`autocomp search`: the main job, from a spec to a verified model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from autocomp.cli.output import print_json, stderr_console, stdout_console
from autocomp.cli.values import Duration


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option(
    "--study", type=click.Path(path_type=Path), help="Where the study is kept [runs/<spec's name>]."
)
@click.option("--workers", type=click.IntRange(min=1), help="Worker processes [one per core].")
@click.option(
    "--ray",
    "ray_address",
    metavar="ADDRESS",
    help="Use a running Ray cluster: HOST:PORT of its head, or auto. Study, AUTOCOMP_CACHE, model "
    "and data must be on storage that all nodes share.",
)
@click.option("--time", "time_limit_s", type=Duration(), help="Propose no trial after this long.")
@click.option(
    "--trials",
    type=click.IntRange(min=0),
    help="Full trials, instead of the spec's; 0: baselines alone.",
)
@click.option("--screen", type=click.IntRange(min=0), help="Candidates screened.")
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Replace a setting of the spec: --set search.trials=4.",
)
@click.option("--tracking-uri", help="MLflow store or server [the study's own].")
@click.option(
    "--fork",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the study of a changed spec in DIR, reusing what the existing study has built.",
)
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the front as JSON at the end.")
def search(
    spec: Path,
    study: Path | None,
    workers: int | None,
    ray_address: str | None,
    time_limit_s: float | None,
    trials: int | None,
    screen: int | None,
    settings: tuple[str, ...],
    tracking_uri: str | None,
    fork: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Search for models within the budget of SPEC.

    Everything from the spec to exported, measured models. Stop at any time: the same command
    continues where it stopped, and more --trials continue a finished study.
    """
    from autocomp.cli.interrupts import stoppable
    from autocomp.front.pick import NothingFitsError
    from autocomp.report.live import open_view
    from autocomp.spec.loader import parse_overrides

    overrides = parse_overrides(settings)
    directory = study or default_study(spec)
    try:
        with open_view(stderr_console(), quiet=quiet, study=str(fork or directory)) as progress:
            from autocomp import api

            found = api.search(
                spec,
                study=directory,
                workers=workers,
                ray_address=ray_address,
                trials=trials,
                screen=screen,
                time_limit_s=time_limit_s,
                overrides=overrides,
                progress=stoppable(progress),
                tracking_uri=tracking_uri,
                **({} if fork is None else {"fork": fork}),
            )
    except NothingFitsError:
        if not as_json:  # what was measured, above the message that says what to relax
            _print_front(api.open_study(fork or directory).front())
        raise
    view = found.front()
    if as_json:
        print_json(view)
    else:
        _print_front(view)


def _print_front(view: Mapping[str, Any]) -> None:
    from autocomp.report.terminal import print_front

    print_front(stdout_console(), view)


def default_study(spec: Path) -> Path:
    """`search_spaces/quickstart.yaml` → `runs/quickstart`."""
    return Path("runs") / spec.stem
