"""`python -m benchmarks [NAME…]`: run, print the figures beside their goals, keep them."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from benchmarks import NAMES
from benchmarks.results import write
from benchmarks.tables import plain


def main() -> None:
    """Run the benchmarks named on the command line, all of them by default."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument(
        "--study", type=Path, help="controller: read this finished study instead of searching"
    )
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}. Allowed: {', '.join(NAMES)}")
    for name in options.names or NAMES:
        print(f"{name} …", flush=True)
        figures = importlib.import_module(f"benchmarks.{name}").run(options)
        print(plain(name, write(name, figures)), flush=True)


if __name__ == "__main__":
    main()
