"""`ls` lists what there is, also where one package is broken."""

from __future__ import annotations

import importlib.metadata

import pytest

from autocomp.api import listing
from autocomp.api.listing import KINDS, list_kind
from autocomp.core import registry as registry_module
from autocomp.core.registry import Registry


def test_a_broken_package_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = importlib.metadata.EntryPoint("mine", "no_such_package:Thing", "autocomp.tasks")
    monkeypatch.setattr(registry_module, "entry_points", lambda *, group: [broken])
    built_in = {"language-modeling": "autocomp.tasks.language_modeling:LanguageModeling"}
    monkeypatch.setattr(listing, "_registry", lambda kind: Registry(kind, built_in))
    model, mine = list_kind("tasks")
    assert model["summary"] == "the next token of running text; perplexity"
    assert mine["name"] == "mine"
    assert "'mine' (no_such_package:Thing) cannot be loaded" in mine["summary"]
    assert "No module named 'no_such_package'" in mine["summary"]
    assert set(mine) == set(model)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str) -> None:
    rows = list_kind(kind)
    assert rows
    assert not [row["name"] for row in rows if "cannot be loaded" in row["summary"]]
