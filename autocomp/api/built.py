"""What building the library took: an entry per item in the study's ledger, and a line to read.

Entries of kind `built`, by item key: `{"unit", "option", "seconds", "peak_bytes", "size_bytes",
"training"}`; `training` is `null`, or of the replacement the option begins with `{"error_before",
"error", "steps", "ended", "rate", "seconds"}`. An item is built once for all studies of a machine,
so a study has entries of those it was the first to need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autocomp.core.quantities import format_bytes, format_seconds
from autocomp.study.ledger import Ledger

if TYPE_CHECKING:
    from autocomp.library.build import ItemInfo

KIND = "built"
TRAINING = ("error_before", "error", "steps", "ended", "rate", "seconds")


def record_built(items: Sequence[ItemInfo], ledger: Ledger) -> None:
    """Write what is known about the items."""
    ledger.append_many(KIND, [(item.key, _entry(item)) for item in items])


def built_note(items: Sequence[ItemInfo]) -> str | None:
    """The slowest item and the one of most memory, in a line; `None` where there are none."""
    if not items:
        return None
    slowest = max(items, key=lambda item: item.seconds)
    largest = max(items, key=lambda item: item.peak_bytes)
    return (
        f"library: {len(items)} items built; slowest {_named(slowest)} in "
        f"{format_seconds(slowest.seconds)}; most memory {format_bytes(largest.peak_bytes)} at "
        f"{_named(largest)}"
    )


def _named(item: ItemInfo) -> str:
    return f"{item.unit} ({item.option.label()})"


def _entry(item: ItemInfo) -> dict[str, Any]:
    training = item.training
    return {
        "unit": item.unit,
        "option": item.option.label(),
        "seconds": round(item.seconds, 3),
        "peak_bytes": item.peak_bytes,
        "size_bytes": item.size_bytes,
        "training": None if training is None else {key: training.get(key) for key in TRAINING},
    }
