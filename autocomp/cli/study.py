"""`autocomp front`, `pick`, `dashboard`: commands on an existing study."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import click

from autocomp.cli.output import print_json, stderr_console, stdout_console
from autocomp.cli.values import QUALITY, quantity
from autocomp.core.errors import UserError
from autocomp.core.files import write_text_atomic
from autocomp.core.quantities import Dimension

_STUDY = click.argument("study", type=click.Path(path_type=Path))


@click.command()
@_STUDY
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a web page to FILE."
)
@click.option("--estimated", is_flag=True, help="Also show what the cost table predicted.")
@click.option(
    "--against",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="OTHER",
    help="Also compare with the front of study OTHER, of the same model and task.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def front(
    study: Path, html: Path | None, estimated: bool, against: Path | None, as_json: bool
) -> None:
    """Show the front of STUDY: its measured trials and the one chosen."""
    from autocomp import api

    view = api.open_study(study).front(against)
    if html is not None:
        from autocomp.report.html import front_html

        write_text_atomic(html, front_html(view))
        stderr_console().print(f"Wrote {html}", markup=False)
    if as_json:
        print_json(view)
    elif html is None or estimated:
        from autocomp.report.terminal import print_front

        print_front(stdout_console(), view, estimated=estimated)


@click.command()
@_STUDY
@click.option("--latency", type=quantity("latency"), help='Upper limit: "4 ms" or "25%" of dense.')
@click.option("--size", type=quantity("size"), help='Upper limit: "12 MB" or "25%" of dense.')
@click.option("--peak-memory", type=quantity("peak_memory"), help='Upper limit: "200 MB", "50%".')
@click.option(
    "--quality", type=QUALITY, help='Lower limit: 0.9, "98%" of dense, or "perplexity 50".'
)
@click.option(
    "--best", is_flag=True, help="Take the highest quality, not what is as good within its noise."
)
@click.option(
    "--least",
    type=click.Choice(["latency", "size", "peak-memory"]),
    help="Take what costs least of this, of all that meet the limits [latency where --quality is "
    "the only one].",
)
@click.option(
    "--export",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write the model, its tokenizer and its card to DIR, and verify it.",
)
@click.option(
    "--format",
    "format",
    metavar="NAME",
    help="Format of --export: see 'autocomp ls exporters' [what the trial's runtime opens].",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def pick(
    study: Path,
    latency: str | None,
    size: str | None,
    peak_memory: str | None,
    quality: str | None,
    best: bool,
    least: str | None,
    export: Path | None,
    format: str | None,
    as_json: bool,
) -> None:
    """Choose a trial of STUDY within a budget; without limits, within the study's own.

    Models whose quality differs from the best's by no more than noise count as tied. Of these it is
    the one whose outputs are closest to the teacher's, even if another is faster, or a simpler one
    that is as close and costs no more. With --least it is the one that costs least.
    Answers from what was measured; runs no new trial.
    """
    from autocomp import api

    if format is not None:
        _check_format(format, export)
    opened = api.open_study(study)
    picked = opened.pick(
        latency=latency,
        size=size,
        peak_memory=peak_memory,
        quality=quality,
        best=best,
        least=None if least is None else cast(Dimension, least.replace("-", "_")),
    )
    exported = None if export is None else picked.export(export, format)
    trial = picked.to_json()
    if as_json:
        print_json({**trial, "export": exported})
        return
    from autocomp.report.tables import print_picked

    command = f"autocomp pick {study}"
    for flag, value in (
        ("--latency", latency),
        ("--size", size),
        ("--peak-memory", peak_memory),
        ("--quality", quality),
        ("--least", least),
    ):
        if value is not None:
            command += f' {flag} "{value}"'
    command += " --best" if best else ""
    view = opened.front()
    dense = next((t for t in view["trials"] if t["id"] == view["dense"]), None)
    print_picked(stdout_console(), trial, dense, exported, f"{command} --export out/")


def _check_format(format: str, export: Path | None) -> None:
    from autocomp.export import EXPORTERS

    if export is None:
        raise UserError(f"--format {format} says how to export: name a directory by --export DIR")
    EXPORTERS.get(format)


@click.command()
@_STUDY
@click.option("--port", type=click.IntRange(0, 65535), default=5000, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the address as JSON, then serve.")
def dashboard(study: Path, port: int, as_json: bool) -> None:
    """Serve the MLflow pages of STUDY on this machine and print the address of its front.

    Listens on 127.0.0.1 only, until stopped with Ctrl-C. A port of 0 takes a free one.
    """
    from autocomp.report.dashboard import Dashboard

    with Dashboard.open(study, port) as served:
        if as_json:
            print_json(
                {
                    "url": served.url,
                    "front_url": served.front_url,
                    "tracking_uri": served.tracking_uri,
                }
            )
        else:
            console = stdout_console()
            for what, url in (("runs ", served.url), ("front", served.front_url)):
                console.print(f"{what}  {url}", markup=False, soft_wrap=True)
            if served.serving:
                console.print("Stop with Ctrl-C.")
        served.wait()
