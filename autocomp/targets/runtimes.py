"""Which runtimes a spec's target names, and which of them can be used here.

Imports no runtime, unless only the runtime knows.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from autocomp.core.candidate import Runtime
from autocomp.core.errors import InternalError, UserError, did_you_mean
from autocomp.spec.schema import AUTO, TargetSection
from autocomp.targets import TARGETS

DEFAULT = "onnxruntime"
PACKAGES = {
    "onnxruntime-cpu": "onnxruntime",
    "openvino-cpu": "openvino",
    "openvino_bf16-cpu": "openvino",
}
"""Target → the package it runs on; one that is not here is asked by importing it."""

PARTICULAR = ("openvino_bf16-cpu",)
"""Of these, targets that ask more of a machine than the package: they too are imported."""

RELATIVES = {"openvino-cpu": ("openvino_bf16-cpu",)}
"""Target → those with the same recipes, where the same operators buy speed and bytes."""

EXTRAS = ("openvino",)
"""Packages that an extra of the same name installs."""


def with_relatives(names: Iterable[str]) -> list[str]:
    """`names` of targets, each followed by its relatives."""
    return [each for name in names for each in (name, *RELATIVES.get(name, ()))]


def unusable(name: str) -> str | None:
    """Why the target of this name cannot be used here, or `None` if it can."""
    package = PACKAGES.get(name)
    if package is not None and not find_spec(package):
        extra = f": pip install 'autocomp[{package}]'" if package in EXTRAS else ""
        return f"the package {package} is not installed{extra}"
    if package is not None and name not in PARTICULAR:
        return None
    try:
        TARGETS.get(name)
    except (InternalError, UserError) as error:
        return str(error)
    return None


def usable_runtimes(section: TargetSection) -> tuple[tuple[Runtime, ...], list[str]]:
    """The runtimes to search on, the one relative limits refer to first; notes on those left out.

    `(None,)` where the spec names one runtime and leaves no choice. `auto` leaves out what is not
    installed; what a spec names must be there.

    Raises:
        UserError: for a runtime that is unknown or cannot be used here, or if none is left.
    """
    ending = f"-{section.device}"
    known = [name.removesuffix(ending) for name in TARGETS.names() if name.endswith(ending)]
    if section.runtime != AUTO:
        named = [section.runtime] if isinstance(section.runtime, str) else section.runtime
        for runtime in named:
            name = section.on(runtime).label
            if name not in TARGETS:
                raise UserError(
                    f"no runtime {runtime!r} for device {section.device!r}."
                    f"{did_you_mean(runtime, known)} Available there: "
                    f"{', '.join(known) or 'none'}. See: autocomp ls targets"
                )
            reason = unusable(name)
            if reason is not None:
                raise UserError(f"{name} cannot be used here: {reason}")
        return (tuple(named) if section.chosen else (None,)), []
    found: list[str] = []
    notes = []
    for runtime in sorted(known, key=lambda runtime: (runtime != DEFAULT, runtime)):
        reason = unusable(f"{runtime}{ending}")
        if reason is None:
            found.append(runtime)
        else:
            notes.append(f"runtime {runtime} is left out: {reason}")
    if not found:
        raise UserError(
            f"no runtime for device {section.device!r} can be used here"
            f"{': ' + '; '.join(notes) if notes else ''}. See: autocomp ls targets"
        )
    return tuple(found), notes
