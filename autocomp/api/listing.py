"""`ls`: what is available of each kind of extension, built in or from other packages."""

from __future__ import annotations

from typing import Any

from autocomp.core.errors import InternalError, UserError, did_you_mean
from autocomp.core.registry import Registry
from autocomp.targets.runtimes import with_relatives

KINDS = ("operators", "mixers", "losses", "targets", "tasks", "exporters")


def list_kind(kind: str) -> list[dict[str, Any]]:
    """One row per extension: `name`, `summary`, `paper`, `options`, `speeds_up`, `shrinks`,
    `saves_memory`, `expresses` (exporters: which candidates they can write).

    What cannot be loaded is listed too, its summary says why.

    Raises:
        UserError: for an unknown kind.
    """
    registry = _registry(kind)
    rows = []
    for name in registry.names():
        try:
            item = registry.get(name)
        except (UserError, InternalError) as error:
            # What it stands on is not installed, or the package that registered it is broken.
            rows.append(_row(name, str(error)))
            continue
        summary = getattr(item, "summary", None) or (item.__doc__ or "").strip().split("\n")[0]
        rows.append(_row(name, summary, item))
    return rows


def _row(name: str, summary: str, item: object = None) -> dict[str, Any]:
    return {
        "name": name,
        "summary": summary,
        "paper": getattr(item, "paper", ""),
        "options": getattr(item, "choices", "") or _used(item),
        "speeds_up": with_relatives(getattr(item, "speeds_up", ())),
        "shrinks": with_relatives(getattr(item, "shrinks", ())),
        "saves_memory": with_relatives(getattr(item, "saves_memory", ())),
        "expresses": getattr(item, "expresses", ""),
    }


def _used(item: object) -> str:
    """The settings that a loss depends on, as a spec has them."""
    return ", ".join(f"distill.{name}" for name in getattr(item, "uses", ()))


def _registry(kind: str) -> Registry[Any]:
    if kind == "operators":
        from autocomp.operators import OPERATORS

        return OPERATORS
    if kind == "mixers":
        from autocomp.models.mixers import MIXERS

        return MIXERS
    if kind == "losses":
        from autocomp.distill.losses import LOSSES

        return LOSSES
    if kind == "targets":
        from autocomp.targets import TARGETS

        return TARGETS
    if kind == "tasks":
        from autocomp.tasks import TASKS

        return TASKS
    if kind == "exporters":
        from autocomp.export import EXPORTERS

        return EXPORTERS
    raise UserError(
        f"unknown kind {kind!r}.{did_you_mean(kind, KINDS)} Available: {', '.join(KINDS)}"
    )
