"""Registries: lazy, open through entry points, helpful about unknown names."""

import importlib.metadata
import logging
import sys

import pytest

from autocomp.core import registry as registry_module
from autocomp.core.errors import InternalError, UserError, did_you_mean
from autocomp.core.registry import Registry


@pytest.fixture
def entries(monkeypatch):
    """Entry points other packages would declare, by (name, value)."""
    declared = []

    def entry_points(*, group):
        return [importlib.metadata.EntryPoint(name, value, group) for name, value in declared]

    monkeypatch.setattr(registry_module, "entry_points", entry_points)
    return declared


def test_imports_at_first_use_only(entries, tmp_path, monkeypatch):
    (tmp_path / "lazy_extension.py").write_text("class Table:\n    class Thing: value = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("operators", {"thing": "lazy_extension:Table.Thing"})
    assert registry.names() == ["thing"]
    assert "thing" in registry
    assert "lazy_extension" not in sys.modules
    assert registry.get("thing").value == 3
    assert registry.get("thing") is registry.get("thing")


def test_unknown_name_says_what_is_known(entries):
    registry = Registry("operators", {"gptq": "x:y", "rtn": "x:y"})
    with pytest.raises(UserError) as caught:
        registry.get("gptqq")
    assert str(caught.value) == (
        "unknown operator 'gptqq'. Did you mean 'gptq'? Available: gptq, rtn. "
        "See: autocomp ls operators"
    )


def test_entry_points_add_names_and_cannot_replace_ours(entries, caplog):
    entries += [("mine", "collections:OrderedDict"), ("rtn", "collections:Counter")]
    registry = Registry("operators", {"rtn": "fractions:Fraction"})
    with caplog.at_level(logging.WARNING):
        assert list(registry) == ["mine", "rtn"]
    assert "'rtn' (collections:Counter) is ignored" in caplog.text
    assert registry.get("mine").__name__ == "OrderedDict"
    assert registry.get("rtn").__name__ == "Fraction"


@pytest.mark.parametrize(
    "value", ["no_such_package_here:x", "collections:Nothing", "collections", "not a name:"]
)
def test_a_broken_extension_is_named(entries, value):
    entries += [("broken", value), ("fine", "collections:OrderedDict")]
    registry = Registry("targets", {})
    named = value.replace(" ", "")
    with pytest.raises(InternalError, match=f"'broken' .{named}. cannot be loaded"):
        registry.get("broken")
    assert registry.names() == ["broken", "fine"]
    assert registry.get("fine").__name__ == "OrderedDict"


def test_an_extension_that_raises_when_it_is_imported(entries, tmp_path, monkeypatch):
    (tmp_path / "raises_at_import.py").write_text("raise ValueError('no such device')\n")
    (tmp_path / "lacks_something.py").write_text(
        "from autocomp.core.errors import UserError\nraise UserError('install it')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    entries += [("broken", "raises_at_import:x"), ("absent", "lacks_something:x")]
    with pytest.raises(InternalError, match="cannot be loaded: ValueError: no such device"):
        Registry("targets", {}).get("broken")
    with pytest.raises(UserError, match=r"^install it$"):
        Registry("targets", {}).get("absent")


def test_extras_of_an_entry_point_are_no_part_of_its_name(entries):
    entries.append(("mine", "collections:OrderedDict [fast]"))
    assert Registry("tasks", {}).get("mine").__name__ == "OrderedDict"


def test_register_by_hand(entries):
    registry = Registry("tasks", {"a": "x:y"})
    registry.register("b", 5)
    assert registry.get("b") == 5
    for taken in ("a", "b"):
        with pytest.raises(UserError, match="already registered"):
            registry.register(taken, 6)


def test_did_you_mean():
    assert did_you_mean("quickstrat", ["quickstart", "tiny"]) == " Did you mean 'quickstart'?"
    assert did_you_mean("ONNXRUNTIME", ["onnxruntime"]) == " Did you mean 'onnxruntime'?"
    assert did_you_mean("zebra", ["quickstart"]) == ""
