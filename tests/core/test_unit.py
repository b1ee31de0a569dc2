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
    assert unit.macs(T) == 4 * T * D * D + 2 * T * T * D
    ffn = Unit("f", "ffn", (Site("u", "up", F, D, True), Site("d", "down", D, F, True)), width=F)
    assert ffn.macs(T) == 2 * T * D * F
    table = Unit("embeddings", "embedding", (Site("e", "embedding", 1000, D, False),))
    assert (table.parameters, table.macs(T)) == (1000 * D, 0)


def test_signature_ignores_names():
    assert (
        attention("layers.0.attention").signature() == attention("layers.7.attention").signature()
    )
    assert attention().signature() != attention(bias=False).signature()


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
