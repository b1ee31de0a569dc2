"""The phase that scores options: all of few, the ends of families of many, none a second time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from autocomp.api import screening
from autocomp.api.session import Measured, Session
from autocomp.core.candidate import Candidate, Option, Step
from autocomp.core.unit import Unit
from autocomp.library.store import Library
from autocomp.report.progress import Silent
from autocomp.search.scores import Scores
from autocomp.search.space import Space
from autocomp.study.ledger import Ledger

NAMES = ("layers.0.ffn", "layers.1.ffn")
ERRORS = {8: 0.001, 4: 0.01, 3: 0.05, 2: 0.2}
PRUNED = 0.03


def option(bits: int | None, keep: int | None = None) -> Option:
    pruned = () if keep is None else (Step.of("width", keep=keep),)
    rounded = () if bits is None else (Step.of("rtn", weights=bits, activations=32, group=0),)
    return Option((*pruned, *rounded))


OPTIONS = tuple(option(bits, keep) for keep in (None, 64) for bits in (None, *ERRORS))


def error(one: Option) -> float:
    bits = one.step("rtn")
    rounding = 0.0 if bits is None else ERRORS[cast(int, bits["weights"])]
    return rounding + (0.0 if one.step("width") is None else PRUNED)


def kl(candidate: Candidate) -> float:
    return sum((2 + at) * error(candidate[name]) for at, name in enumerate(NAMES))


class Pool:
    """Answers in this process, and counts what it was asked."""

    asked = 0

    def map_unordered(self, method: str, payloads: list[Any]) -> Iterator[tuple[int, Any]]:
        assert method == "evaluate"
        for at, payload in enumerate(payloads):
            Pool.asked += len(payload)
            yield at, [kl(Candidate.from_json(one)) for one in payload]


class Audience(Silent):
    def __init__(self) -> None:
        self.steps: list[tuple[int, int | None]] = []
        self.notes: list[str] = []

    def phase(self, name: str, total: int | None = None) -> None:
        assert name == "scores"
        self.steps.append((0, total))

    def advance(self, done: int, total: int | None = None) -> None:
        self.steps.append((done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        yield


def scored(directory: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Scores, Audience, int]:
    """Scores, what was shown, and how many candidates were evaluated."""
    library = Library(directory / "library")
    items: dict[tuple[str, str], str] = {}
    for name in NAMES:
        for one in OPTIONS:
            if not one.dense:
                key = items[name, one.key] = f"{one.key}{name[7]}"
                half = error(one) / 2
                library.put(key, {}, {"error": {"up": half, "down": half}})
    space = Space(
        [Unit(name, "ffn", (), layer=at) for at, name in enumerate(NAMES)],
        dict.fromkeys(NAMES, OPTIONS),
    )
    audience = Audience()
    session = SimpleNamespace(
        plan=SimpleNamespace(space=space),
        study=SimpleNamespace(ledger=Ledger(directory / "ledger.jsonl")),
        progress=audience,
        cluster=lambda: SimpleNamespace(workers=2),
    )
    context = SimpleNamespace(library_path=library.root, items=items)
    measured = SimpleNamespace(context=context)
    monkeypatch.setattr(screening._Screening, "_screeners", lambda self: Pool())
    Pool.asked = 0
    with ExitStack() as stack:
        phase = screening._Screening(cast(Session, session), cast(Measured, measured), stack)
        return phase.score(), audience, Pool.asked


def test_few_options_are_scored_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, audience, evaluated = scored(tmp_path, monkeypatch)
    assert evaluated == 2 * 9
    assert audience.steps[0] == (0, 18)
    assert audience.steps[-1] == (18, 18)
    assert audience.notes == []
    assert scores.of(NAMES[1], OPTIONS[-1]) == pytest.approx(3 * (0.2 + PRUNED))


def test_of_many_the_ends_of_families_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screening, "EACH", 10)
    scores, audience, evaluated = scored(tmp_path, monkeypatch)
    assert evaluated == 2 * 3, "2 bits; half the width as it is, and in 2 bits"
    assert audience.steps[-1] == (6, 6)
    assert audience.notes == ["6 of 18 options scored, those between by their local errors"]
    for at, name in enumerate(NAMES):
        for one in OPTIONS:
            assert scores.of(name, one) == pytest.approx((2 + at) * error(one))

    again, audience, evaluated = scored(tmp_path, monkeypatch)
    assert evaluated == 0
    assert again.to_json() == scores.to_json()
    assert audience.steps == [(0, 6)]

    monkeypatch.setattr(screening, "EACH", 500)  # what is missing is made up for
    every, audience, evaluated = scored(tmp_path, monkeypatch)
    assert evaluated == 12
    assert audience.steps[0] == (0, 18)
    assert every.of(NAMES[0], OPTIONS[2]) == pytest.approx(2 * ERRORS[4])
