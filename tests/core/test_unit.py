"""Units and formats: counts against closed forms of a small transformer block."""

import pytest

from autocomp.core.unit import Site, SiteFormat, Unit, dense_format, resized

D, F, T = 64, 256, 10


def attention(name="layers.0.attention", bias=True):
    sites = tuple(
        Site(f"{name}.{role}", role, D, D, bias) for role in ("query", "key", "value", "output")
    )
    return Unit(name, "attention", sites, layer=0, heads=4, kv_heads=4, head_dim=16)


def test_counts():
    unit = attention()
    assert unit.parameters == 4 * (D * D + D)
    assert attention(bias=False).parameters == 4 * D * D
    table = Unit("embeddings", "embedding", (Site("e", "embedding", 1000, D, False),))
    assert table.parameters == 1000 * D


def test_formats():
    table = Unit("embeddings", "embedding", (Site("e", "embedding", 1000, D, False),))
    assert dense_format(table) == {"e": SiteFormat(1000, D, False, embedding=True)}
    query = dense_format(attention())["layers.0.attention.query"]
    assert query == SiteFormat(D, D, True)
    assert resized(query, rows=32) == SiteFormat(32, D, True)
    assert resized(query, columns=48) == SiteFormat(D, 48, True)


def test_site_by_role():
    site = attention().site("key")
    assert site is not None
    assert site.name.endswith("key")
    assert attention().site("down") is None
    with pytest.raises(AttributeError):
        site.rows = 3  # type: ignore[misc]
