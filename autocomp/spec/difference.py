"""Specs as text and compared: the copy a study keeps, and what changed between two."""

from __future__ import annotations

from typing import Any

import yaml

from autocomp.spec.schema import Spec
from autocomp.spec.source import FLOAT, Parts, dotted

_ABSENT = "(absent)"


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML version would read as something else than text."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def dump_spec(spec: Spec) -> str:
    """The whole spec, defaults included, as YAML that loads to an equal spec."""
    return yaml.dump(
        spec.model_dump(mode="json"),
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=100,
    )


def spec_diff(old: Spec, new: Spec) -> list[str]:
    """A line for each value that differs: `budget.latency: '20%' → '25%'`.

    Lists of sections are compared entry by entry, lists of values as a whole.
    """
    return [
        f"{dotted(place)}: {_show(before)} → {_show(after)}"
        for place, before, after in _compare(
            old.model_dump(mode="json"), new.model_dump(mode="json"), ()
        )
    ]


def _compare(old: Any, new: Any, place: Parts) -> list[tuple[Parts, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
    elif _sections(old) and _sections(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
        keys = list(range(max(len(old), len(new))))
    else:
        return [] if old == new else [(place, old, new)]
    return [
        found
        for key in keys
        for found in _compare(old.get(key, _ABSENT), new.get(key, _ABSENT), (*place, key))
    ]


def _sections(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if value == _ABSENT:
        return _ABSENT
    if isinstance(value, dict):
        return yaml.dump(
            value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=10**6
        ).strip()
    return repr(value)
