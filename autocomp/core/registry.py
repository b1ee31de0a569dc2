"""Registries of extensions: lazy, typed, open to other packages through entry points.

A built-in is registered as `name → "module:attribute"` and imported at first use, so that listing
names never imports torch. Another package adds its own under the entry-point group
`autocomp.<kind>` (for example `autocomp.operators`).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from operator import attrgetter
from typing import Generic, TypeVar, cast

from autocomp.core.errors import AutocompError, InternalError, UserError, did_you_mean

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Registry(Generic[T]):
    """Names of one kind of extension, each resolved to its instance at first use."""

    def __init__(self, kind: str, builtin: Mapping[str, str]) -> None:
        """`kind` is plural ("operators"); `builtin` maps a name to `module:attribute`."""
        self.kind = kind
        self._paths = dict(builtin)
        self._loaded: dict[str, T] = {}
        self._scanned = False

    @property
    def _one(self) -> str:
        """The kind in the singular."""
        return self.kind.removesuffix("es" if self.kind.endswith("sses") else "s")

    def _scan(self) -> None:
        if not self._scanned:
            for entry in entry_points(group=f"autocomp.{self.kind}"):
                if entry.name in self._paths:
                    logger.warning(
                        "%s: %r (%s) is ignored: taken", self.kind, entry.name, entry.value
                    )
                else:
                    self._paths[entry.name] = entry.value.partition("[")[0].replace(" ", "")
            self._scanned = True

    def register(self, name: str, value: T) -> None:
        """Add an extension by hand (tests, notebooks). Raises UserError if the name is taken."""
        self._scan()
        if name in self._paths or name in self._loaded:
            raise UserError(f"{self.kind}: {name!r} is already registered")
        self._loaded[name] = value

    def names(self) -> list[str]:
        """Every known name, sorted."""
        self._scan()
        return sorted({*self._paths, *self._loaded})

    def get(self, name: str) -> T:
        """The extension of this name.

        Raises:
            UserError: for an unknown name, with the closest known one and the whole list.
            InternalError: if what another package registered cannot be loaded.
        """
        self._scan()
        if name not in self._loaded:
            if name not in self._paths:
                raise UserError(
                    f"unknown {self._one} {name!r}."
                    f"{did_you_mean(name, self.names())} Available: {', '.join(self.names())}. "
                    f"See: autocomp ls {self.kind}"
                )
            self._loaded[name] = self._import(name)
        return self._loaded[name]

    def _import(self, name: str) -> T:
        module, _, attribute = self._paths[name].partition(":")
        try:
            return cast(T, attrgetter(attribute)(importlib.import_module(module)))
        except AutocompError:
            raise  # it says itself what it lacks
        except Exception as error:  # code of other packages runs at import
            raise InternalError(
                f"{self.kind}: {name!r} ({self._paths[name]}) cannot be loaded: "
                f"{type(error).__name__}: {error}. Reinstall or remove the package that provides it"
            ) from error

    def __contains__(self, name: object) -> bool:
        self._scan()
        return name in self._paths or name in self._loaded

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
