"""Reads a spec file: YAML, overrides, schema, local paths. Reports every problem it finds at once.

Paths: a local `model.source` or `task.data.source` in the file is relative to the *file's*
directory, one given as an override to the working directory; the spec holds it absolute. A value
counts as local if it begins with `.`, `/` or `~`, ends like a data file, or exists. Anything else
is a hub id, and that and `package:NAME/path` stay as written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from autocomp.core.errors import SpecError, did_you_mean
from autocomp.core.metric import floor_problem
from autocomp.spec.problems import schema_problems
from autocomp.spec.schema import Spec
from autocomp.spec.source import Parts, SpecSource, parse_scalar

_SOURCES: tuple[Parts, ...] = (
    ("model", "source"),
    ("task", "data", "source"),
    ("task", "data", "transfer", "source"),
    ("task", "data", "held_out", "source"),
)
_DATA_ENDINGS = {".csv", ".json", ".jsonl", ".npz", ".parquet", ".tsv", ".txt"}


class LoadedSpec(NamedTuple):
    """A spec and the file it came from; `source.error_at` complains at a line of that file."""

    spec: Spec
    source: SpecSource


def load_spec(path: Path | str, overrides: Mapping[str, Any] | None = None) -> LoadedSpec:
    """Read and check a spec file; local sources must exist.

    Args:
        path: the YAML file.
        overrides: dotted path → value, put over the file's (`{"search.trials": 3}`).

    Raises:
        SpecError: `file:line dotted.path: problem`, one line for each problem.
    """
    source = _read(path)
    source.override(overrides or {})
    source.problems += [*_resolve_sources(source), *_out_of_range(source)]
    return LoadedSpec(_validate(source), source)


def load_stored_spec(path: Path) -> Spec:
    """Read the copy of a spec that a study keeps: sources are absolute, and may be gone by now.

    Raises:
        SpecError: if it was damaged.
    """
    return _validate(_read(path))


def _read(path: Path | str) -> SpecSource:
    source = SpecSource.read(path)
    if source.data is not None and not isinstance(source.data, dict):
        raise source.error_at((), "a spec is a mapping with the keys version, model, task, …")
    return source


def _validate(source: SpecSource) -> Spec:
    try:
        spec = Spec.model_validate(source.data or {}, strict=True)
    except ValidationError as error:
        found = schema_problems(error.errors(), source.data)
        raise source.error([*source.problems, *found]) from None
    if source.problems:
        raise source.error(source.problems)
    return spec


def parse_overrides(settings: Iterable[str]) -> dict[str, Any]:
    """`["search.trials=3", "budget.latency=25%"]`, as after `--set`, as overrides.

    Raises:
        SpecError: for a setting without `=`, or with a value that is not YAML.
    """
    overrides = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise SpecError(f"--set {setting}: write it like --set search.trials=3")
        overrides[name.strip()] = parse_scalar(value)
    return overrides


def _out_of_range(source: SpecSource) -> list[tuple[Parts, str]]:
    """A floor on quality, a number, that no model can be held against.

    Not the schema's business: studies that were made with one shall still open.
    """
    section = (source.data or {}).get("budget")
    floor = section.get("quality") if isinstance(section, dict) else None
    if not isinstance(floor, int | float) or isinstance(floor, bool):
        return []
    problem = floor_problem(floor)
    return [] if problem is None else [(("budget", "quality"), problem)]


def _resolve_sources(source: SpecSource) -> list[tuple[Parts, str]]:
    """Make local sources absolute, in place; the problems are those that do not exist."""
    problems: list[tuple[Parts, str]] = []
    for place in _SOURCES:
        section = source.data or {}
        for part in place[:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        value = section.get("source") if isinstance(section, dict) else None
        if not isinstance(section, dict) or not isinstance(value, str):
            continue
        base = Path() if source.is_overridden(place) else source.file.parent
        local = _local_path(value, base, data=place[0] == "task")
        if local is None:
            continue
        section["source"] = str(local)
        if not local.exists():
            problems.append((place, _missing(local, ".".join(map(str, place)))))
    return problems


def _local_path(value: str, base: Path, *, data: bool) -> Path | None:
    if not value or value.startswith("package:"):
        return None
    path = base / Path(value).expanduser() if value.startswith("~") else base / value
    like_file = data and Path(value).suffix.lower() in _DATA_ENDINGS
    if value[0] in "./~" or like_file or path.exists():
        return Path(os.path.normpath(path.absolute()))  # symbolic links stay as they are
    return None


def _missing(path: Path, name: str) -> str:
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return (
        f"no such file or directory: {path}.{did_you_mean(path.name, beside)} "
        f"Put it there, or give yours with --set {name}=PATH"
    )
