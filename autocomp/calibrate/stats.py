"""Calibration statistics of a unit: what operators read, and the file they are kept in.

One safetensors file per unit. Sites that see the same input (query, key, value) share one Gram
matrix, in the file and in memory: `load_stats` gives them the same tensor object, so that whatever
is derived from it (a factorisation) can be shared too. Imports torch inside functions only.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from autocomp.core.errors import InternalError
from autocomp.core.files import write_atomic

if TYPE_CHECKING:
    import torch

VERSION = 2
"""Raised when statistics gain or change a part: earlier files are then gathered again."""

Need = Literal["gram", "range", "rows", "recording"]
"""What of a unit's inputs an operator reads: Gram matrices with means, extremes with a sample, how
often a table's rows are looked up, all that attention was called with."""

GATHERED: frozenset[Need] = frozenset({"gram", "range"})
"""What is gathered where a model runs on the calibration examples."""

_OPTIONAL = ("rows", "low", "high", "sample")


@dataclass(frozen=True)
class SiteStats:
    """Calibration statistics at one site.

    Attributes:
        gram: float32 `(columns, columns)`, the sum of x xᵀ over `count` real tokens.
        mean: float32 `(columns,)`, mean input.
        count: tokens seen.
        rows: of a table, int64 `(rows,)`: how often each row was looked up; Gram matrix and mean
            are empty then, as they are where no operator needs them.
        low, high: float32 `(columns,)`, smallest and largest input of each column.
        sample: float32 `(n, columns)`, inputs of some of the tokens; see `calibrate.values`.
    """

    gram: torch.Tensor
    mean: torch.Tensor
    count: int
    rows: torch.Tensor | None = None
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    sample: torch.Tensor | None = None

    @property
    def has_gram(self) -> bool:
        """Whether the Gram matrix was gathered."""
        return self.gram.numel() > 0


UnitStats = Mapping[str, SiteStats]
"""Site name → statistics; tables have `rows` alone, or none."""


class RecordedStats(dict[str, SiteStats]):
    """Statistics of a unit, and the file that holds what its attention was called with."""

    def __init__(self, stats: UnitStats, recording: Path) -> None:
        super().__init__(stats)
        self.recording = recording


def recording_path(stats_path: Path) -> Path:
    """Where what a unit's attention was called with is kept, beside the unit's statistics."""
    return stats_path.with_name(f"{stats_path.stem}.recording.safetensors")


def save_stats(path: Path, stats: UnitStats) -> None:
    """Write the statistics of one unit, atomically; shared Gram matrices once.

    Raises:
        StorageError: if the disk is full or refuses.
    """
    from safetensors.torch import save

    slots: dict[int, int] = {}
    tensors: dict[str, torch.Tensor] = {}
    sites: dict[str, dict[str, int]] = {}
    for name, site in stats.items():
        slot = slots.setdefault(id(site.gram), len(slots))
        tensors[f"gram.{slot}"] = site.gram.contiguous()
        tensors[f"mean.{slot}"] = site.mean.contiguous()
        for part in _OPTIONAL:
            value = getattr(site, part)
            if value is not None:
                tensors[f"{part}.{slot}"] = value.contiguous()
        sites[name] = {"slot": slot, "count": site.count}
    data = save(tensors, metadata={"sites": json.dumps(sites)})

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomic(path, write)


def load_stats(path: Path) -> dict[str, SiteStats]:
    """Read what `save_stats` wrote; memory-mapped.

    Raises:
        InternalError: if the file is missing or damaged; calibration has to run again.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            sites = json.loads(file.metadata()["sites"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InternalError(
            f"calibration statistics {path} cannot be read ({error}); delete the file and start "
            f"the same command again"
        ) from error
    return {
        name: SiteStats(
            gram=tensors[f"gram.{entry['slot']}"],
            mean=tensors[f"mean.{entry['slot']}"],
            count=entry["count"],
            **{part: tensors.get(f"{part}.{entry['slot']}") for part in _OPTIONAL},
        )
        for name, entry in sites.items()
    }


def holds(path: Path, needs: Collection[Need]) -> bool:
    """Whether `path` is a file of statistics with all that is asked for at every site."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            sites = json.loads(file.metadata()["sites"])
            names = set(file.keys())
            return all(
                ("range" not in needs or f"low.{slot}" in names)
                and ("gram" not in needs or file.get_slice(f"gram.{slot}").get_shape()[0] > 0)
                for slot in {entry["slot"] for entry in sites.values()}
            ) and bool(sites or not GATHERED.intersection(needs))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return False
