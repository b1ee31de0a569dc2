"""Names of the two factors a low-rank site is made of. No torch.

A site X of rank r becomes the sites `X.first` and `X.second` in formats and states, each a layer in
its own right: for a linear layer `(r, columns)` without bias, then `(rows, r)` with the bias; for a
table a narrower table `(rows, r)`, then a linear layer `(columns, r)`. In a torch model the module
at X has the children `first` and `second`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from autocomp.core.unit import SiteFormat

_FIRST, _SECOND = ".first", ".second"


def first_of(site: str) -> str:
    """`X` → `X.first`."""
    return site + _FIRST


def second_of(site: str) -> str:
    """`X` → `X.second`."""
    return site + _SECOND


def site_of(name: str) -> str:
    """The site a name in a state or format belongs to: `X` for `X`, `X.first` and `X.second`."""
    return name.removesuffix(_FIRST).removesuffix(_SECOND)


def factored_sites(names: Iterable[str]) -> list[str]:
    """The sites among `names` that are there as two factors."""
    known = set(names)
    return [
        site_of(name)
        for name in known
        if name.endswith(_FIRST) and second_of(site_of(name)) in known
    ]


def factor_formats(format: SiteFormat, rank: int) -> tuple[SiteFormat, SiteFormat]:
    """The formats of the two factors of a dense site."""
    if format.embedding:
        first = replace(format, columns=rank)
        return first, SiteFormat(format.columns, rank, bias=False)
    return replace(format, rows=rank, bias=False), replace(format, columns=rank)
