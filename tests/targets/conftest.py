"""Skeletons of the small models, exported once; reduced ones are shared with the models room."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from target_examples import small_model, target

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))


@pytest.fixture(scope="session")
def exported() -> Callable[[str], tuple[Any, Any, Any, Any]]:
    """Layout → (model, units, task, skeleton); the model is shared, do not change it."""
    kept: dict[str, tuple[Any, Any, Any, Any]] = {}

    def export(layout: str) -> tuple[Any, Any, Any, Any]:
        if layout not in kept:
            model, units, task = small_model(layout)
            kept[layout] = (model, units, task, target().export(model, units, task))
        return kept[layout]

    return export
