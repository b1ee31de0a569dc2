"""`profile`: measure the target of a spec, without searching."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocomp.report.progress import SearchProgress


def profile(
    path: Path | str,
    *,
    overrides: Mapping[str, Any] | None = None,
    progress: SearchProgress | None = None,
) -> dict[str, Any]:
    """The cost table of a spec's space on its target."""
    raise NotImplementedError
