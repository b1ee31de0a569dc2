"""Checks a spec against what only other rooms know: the units of a model, registered names.

The spec room cannot import those rooms, so they hand in plain names; complaints carry file:line.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from autocomp.core.errors import did_you_mean
from autocomp.spec.loader import LoadedSpec
from autocomp.spec.source import Parts


def check_names(loaded: LoadedSpec, known: Mapping[str, tuple[str, Iterable[str]]]) -> None:
    """Check that names in a spec are registered.

    Args:
        loaded: the spec and its source.
        known: place pattern → (kind as in `autocomp ls KIND`, names); `[*]` stands for every entry:
            `{"space[*].bits.method": ("operators", ["gptq", "rtn"])}`. A place that holds a list is
            checked entry by entry.

    Raises:
        SpecError: a line for each unknown name, with the closest known one.
    """
    data = loaded.spec.model_dump(mode="json")
    problems: list[tuple[str | Parts, str]] = []
    for pattern, (kind, names) in known.items():
        allowed = sorted(names)
        for place, value in _find(data, re.findall(r"[^.\[\]]+", pattern), ()):
            if value not in allowed:
                problems.append(
                    (
                        place,
                        f"unknown {value!r}.{did_you_mean(str(value), allowed)} "
                        f"Available: {', '.join(allowed)}. See: autocomp ls {kind}",
                    )
                )
    if problems:
        raise loaded.source.error(problems)


def check_losses(loaded: LoadedSpec, names: Sequence[str], leads: Callable[[str], bool]) -> None:
    """Check the sums in `distill.loss`.

    Args:
        loaded: the spec and its source.
        names: every loss there is.
        leads: whether a sum may begin with a loss; asked of those the spec names.

    Raises:
        SpecError: a line for each unknown name, and each sum that begins with the wrong one.
    """
    problems: list[tuple[str | Parts, str]] = []
    for index, text in enumerate(loaded.spec.distill.loss):
        terms, place = text.split("+"), ("distill", "loss", index)
        unknown = [name for name in terms if name not in names]
        problems += [
            (
                place,
                f"unknown {name!r}.{did_you_mean(name, names)} Available, also in sums "
                f"(logits+hidden): {', '.join(names)}. See: autocomp ls losses",
            )
            for name in unknown
        ]
        if not unknown and not leads(terms[0]):
            first = [name for name in names if leads(name)]
            problems.append(
                (
                    place,
                    f"{text} begins with {terms[0]}, which leaves open what the student answers. "
                    f"A sum begins with one of {', '.join(first)}: {first[0]}+{terms[0]}",
                )
            )
    if problems:
        raise loaded.source.error(problems)


def _find(data: Any, words: Sequence[str], above: Parts) -> list[tuple[Parts, Any]]:
    """Every (place, value) a pattern reaches; lists at its end are opened."""
    if isinstance(data, list) and (not words or words[0] == "*"):
        return [f for i, x in enumerate(data) for f in _find(x, words[1:], (*above, i))]
    if data is None:  # left out
        return []
    if not words:
        return [(above, data)]
    return _find(data[words[0]], words[1:], (*above, words[0]))


def match_rules(loaded: LoadedSpec, units: Sequence[str]) -> dict[str, int]:
    """Unit name → index of the rule in `space` that holds for it: the last one that matches.

    Units no rule matches are left out. Order of `units`.

    Raises:
        SpecError: for each rule whose pattern matches no unit.
    """
    holds: dict[str, int] = {}
    problems: list[tuple[str | Parts, str]] = []
    for index, rule in enumerate(loaded.spec.space):
        matched = fnmatch.filter(units, rule.match)
        if not matched:
            families = _families(units)
            problems.append(
                (
                    ("space", index, "match"),
                    f"no unit matches {rule.match!r}.{did_you_mean(rule.match, families)} "
                    f"Units: {', '.join(families.values())}",
                )
            )
        holds.update(dict.fromkeys(matched, index))
    if problems:
        raise loaded.source.error(problems)
    return {unit: holds[unit] for unit in units if unit in holds}


def _families(units: Iterable[str]) -> dict[str, str]:
    """Pattern → text: `layers.*.ffn` → `layers.0.ffn … layers.5.ffn`."""
    members: dict[str, list[str]] = {}
    for unit in units:
        members.setdefault(re.sub(r"\d+", "*", unit), []).append(unit)
    return {
        pattern: names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
        for pattern, names in members.items()
    }
