"""autocomp: state a hardware budget, get a compressed transformer back.

import autocomp as ac
study = ac.search("search_spaces/quickstart.yaml")
study.pick(latency="35%", size="30%").export("out/")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["__version__", "check", "list_kind", "open_study", "profile", "search"]

if TYPE_CHECKING:
    from autocomp.api import check, list_kind, open_study, profile, search


def __getattr__(name: str) -> Any:
    """The verbs of `autocomp.api`, imported at first use."""
    if name.startswith("_") or name not in __all__:
        raise AttributeError(f"module 'autocomp' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("autocomp.api"), name)
