"""Results that are kept beside the library, so that a run that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def directory(about: Any) -> Path:
    """Where what was found about something is kept."""
    from autocomp.api.prepare import cache_directory
    from autocomp.core.hashing import content_key

    return cache_directory() / "benchmarks" / "search_quality" / content_key(about)


def kept(path: Path, find: Callable[[], Result], *, anew: bool = False) -> Result:
    """What `find` gave before, as JSON, or gives now; always now if `anew`."""
    from autocomp.core.files import write_text_atomic

    if path.exists() and not anew:
        known: Result = json.loads(path.read_text(encoding="utf-8"))
        return known
    found = find()
    write_text_atomic(path, json.dumps(found))
    return found
