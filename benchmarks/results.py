"""Result files: device, date, versions and figures; nothing else of the machine."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent / "results"
_PACKAGES = (
    "autocomp",
    "torch",
    "transformers",
    "onnxruntime",
    "openvino",
    "numpy",
    "optuna",
    "ray",
)


def write(name: str, figures: Mapping[str, float]) -> dict[str, Any]:
    """Write `results/NAME.json`; returns what it holds."""
    from autocomp.core.files import write_text_atomic
    from autocomp.targets.fingerprint import describe_cpu

    result = {
        "device": describe_cpu(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": _versions(),
        "figures": {figure: float(f"{value:.4g}") for figure, value in figures.items()},
    }
    write_text_atomic(DIRECTORY / f"{name}.json", json.dumps(result, indent=2) + "\n")
    return result


def read(name: str) -> dict[str, Any] | None:
    """What the last run of a benchmark gave, or `None`."""
    path = DIRECTORY / f"{name}.json"
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def _versions() -> dict[str, str]:
    import autocomp

    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = str(getattr(autocomp, "__version__", "source"))
    return found
