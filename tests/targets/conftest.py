"""Skeletons of the small models, exported once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from target_examples import small_model, target


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
