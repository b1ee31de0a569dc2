"""Units, weights and statistics that operators are tried on. Needs torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from autocomp.calibrate.stats import RecordedStats
from autocomp.core.unit import Site, Unit, dense_format
from autocomp.operators.protocol import SiteState, SiteStats, UnitState, UnitStats

USED_ROWS = (0, 3, 4, *range(20, 35))
"""Rows of a table that the example statistics count: what a pruned vocabulary keeps."""


def attention(
    name: str = "layers.0.attention",
    *,
    kv_heads: int = 4,
    bias: bool = True,
    protected_tokens: int | None = None,
) -> Unit:
    """Four heads of 8 on a width of 24; of a vision model if it has protected tokens."""
    shapes = {"query": (32, 24), "key": (kv_heads * 8, 24), "value": (kv_heads * 8, 24)}
    return Unit(
        name,
        "attention",
        tuple(
            Site(f"{name}.{role}", role, *shape, bias)  # type: ignore[arg-type]
            for role, shape in {**shapes, "output": (24, 32)}.items()
        ),
        layer=0,
        heads=4,
        kv_heads=kv_heads,
        head_dim=8,
        skippable=True,
        protected_tokens=protected_tokens,
    )


def ffn(name: str = "layers.0.ffn", *, gated: bool = False, bias: bool = True) -> Unit:
    """An inner width of 96 on a width of 24."""
    roles = {**({"gate": (96, 24)} if gated else {}), "up": (96, 24), "down": (24, 96)}
    return Unit(
        name,
        "ffn",
        tuple(Site(f"{name}.{role}", role, *shape, bias) for role, shape in roles.items()),  # type: ignore[arg-type]
        layer=0,
        width=96,
        skippable=True,
    )


def embedding() -> Unit:
    """A table of 50 rows."""
    return Unit("embeddings", "embedding", (Site("table", "embedding", 50, 24, False),))


def head() -> Unit:
    """A classifier of three labels."""
    return Unit("head", "head", (Site("classifier", "head", 3, 24, True),))


def example_units() -> list[Unit]:
    """One of every kind, with and without biases, grouped queries and gates."""
    return [
        attention(protected_tokens=1),
        attention("layers.1.attention", kv_heads=2, bias=False),
        ffn(),
        ffn("layers.1.ffn", gated=True, bias=False),
        embedding(),
        head(),
    ]


def example_state(unit: Unit, seed: int = 0) -> UnitState:
    """Random dense weights."""
    generator = torch.Generator().manual_seed(seed)
    formats = dense_format(unit)
    return {
        site.name: SiteState(
            weight=torch.randn(site.rows, site.columns, generator=generator),
            bias=torch.randn(site.rows, generator=generator) if site.bias else None,
            format=formats[site.name],
        )
        for site in unit.sites
    }


def example_stats(unit: Unit, tokens: int = 400, seed: int = 1) -> UnitStats:
    """Statistics of correlated random inputs with a mean; equal inputs are shared.

    Of a table, `USED_ROWS` are counted, however many the tokens.
    """
    if unit.kind == "embedding":
        nothing = torch.empty(0)
        seen = torch.zeros(unit.sites[0].rows, dtype=torch.int64)
        seen[list(USED_ROWS)] = torch.arange(1, len(USED_ROWS) + 1)
        rows = SiteStats(nothing.reshape(0, 0), nothing, int(seen.sum()), seen)
        return {unit.sites[0].name: rows}
    generator = torch.Generator().manual_seed(seed)
    shared: dict[int, SiteStats] = {}
    stats: dict[str, SiteStats] = {}
    for site in unit.sites:
        columns = site.columns
        entry = shared.get(columns)
        if entry is None:
            mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
            inputs = torch.randn(tokens, columns, generator=generator) @ mixing
            inputs = inputs + torch.randn(columns, generator=generator)
            low, high = torch.aminmax(inputs, dim=0)
            entry = SiteStats(
                inputs.t() @ inputs,
                inputs.mean(dim=0),
                tokens,
                low=low,
                high=high,
                sample=inputs[:64].clone(),
            )
            shared[columns] = entry
        stats[site.name] = entry
    return stats


def with_dead_columns(stats: UnitStats) -> UnitStats:
    """The statistics with every third column of the input zero."""
    return {name: masked(site, slice(None, None, 3)) for name, site in stats.items()}


def masked(stats: SiteStats, columns: slice) -> SiteStats:
    """The statistics with these columns of the input zero; every site's tensors are its own."""
    gram = stats.gram.clone()
    gram[columns], gram[:, columns] = 0.0, 0.0
    parts = {}
    for part in ("mean", "low", "high", "sample"):
        value = getattr(stats, part)
        if value is not None:
            parts[part] = value.clone()
            parts[part][..., columns] = 0.0
    return replace(stats, gram=gram, **parts)


def without(stats: UnitStats, needs: frozenset[str]) -> UnitStats:
    """The statistics as they are gathered where only `needs` is read."""
    nothing = torch.empty(0)
    found: dict[int, SiteStats] = {}
    for site in stats.values():
        kept = site
        if "gram" not in needs:  # one tensor for each input: it tells which sites share theirs
            kept = replace(kept, gram=torch.empty(0, 0), mean=nothing)
        if "range" not in needs:
            kept = replace(kept, low=None, high=None, sample=None)
        if "rows" not in needs:
            kept = replace(kept, rows=None)
        found.setdefault(id(site), kept)
    kept_sites = {name: found[id(site)] for name, site in stats.items()}
    if isinstance(stats, RecordedStats) and "recording" in needs:
        return RecordedStats(kept_sites, stats.recording)
    return kept_sites


def degenerate(
    unit: Unit, state: UnitState, stats: UnitStats
) -> Iterator[tuple[str, UnitState, UnitStats]]:
    """What calibration and models can come down to: what it is, with its state and statistics."""
    zero = {
        name: replace(site, weight=torch.zeros_like(site.weight)) for name, site in state.items()
    }
    yield "one token", state, example_stats(unit, tokens=1)
    yield "fewer tokens than columns", state, example_stats(unit, tokens=7)
    yield "no input", state, {name: masked(site, slice(None)) for name, site in stats.items()}
    yield "dead inputs", state, with_dead_columns(stats)
    yield "zero weights", zero, stats
