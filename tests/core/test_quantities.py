"""Quantities: parsing against a table, printing against parsing."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocomp.core.errors import UserError
from autocomp.core.quantities import (
    Limit,
    format_bytes,
    format_ms,
    format_seconds,
    parse_limit,
)

FINITE = {"allow_nan": False, "allow_infinity": False}


@pytest.mark.parametrize(
    ("text", "dimension", "value", "relative"),
    [
        ("4 ms", "latency", 4.0, False),
        ("800us", "latency", 0.8, False),
        ("800 \u00b5s", "latency", 0.8, False),
        ("800 \u03bcs", "latency", 0.8, False),
        ("1.5 s", "latency", 1500.0, False),
        ("  25 % ", "latency", 0.25, True),
        ("12 MB", "size", 12_000_000, False),
        ("8 MiB", "size", 8 * 1024 * 1024, False),
        ("1e3 B", "size", 1000, False),
        ("1 GiB", "peak_memory", 1024**3, False),
        ("150%", "peak_memory", 1.5, True),
    ],
)
def test_parse(text, dimension, value, relative):
    limit = parse_limit(text, dimension)
    assert limit.value == pytest.approx(value, rel=1e-12)
    assert limit.relative is relative


@pytest.mark.parametrize("dimension", ["latency", "size", "peak_memory"])
@pytest.mark.parametrize("text", ["", "4", 4, 4.0, True, None, "ms", "-4 ms", "4 parsecs"])
def test_refuses_what_is_no_quantity(text, dimension):
    with pytest.raises(UserError, match=r"%"):
        parse_limit(text, dimension)


@pytest.mark.parametrize(("text", "dimension"), [("4 MB", "latency"), ("4 ms", "size")])
def test_refuses_the_other_dimension(text, dimension):
    with pytest.raises(UserError, match=f"is no {dimension}: write"):
        parse_limit(text, dimension)


@pytest.mark.parametrize("text", ["0 ms", "0%", "0.0 s", "1e999 s"])
def test_refuses_zero_and_infinity(text):
    with pytest.raises(UserError, match="above zero and finite"):
        parse_limit(text, "latency")


def test_names_the_dimension_in_words():
    with pytest.raises(UserError, match="is no peak memory"):
        parse_limit("4 ms", "peak_memory")


@given(st.floats(1e-6, 1e9, **FINITE))
def test_printed_latency_parses_back_to_half_a_percent(value):
    assert parse_limit(format_ms(value), "latency").value == pytest.approx(value, rel=5.1e-3)


@given(st.integers(1, 10**14))
def test_printed_size_parses_back_to_half_a_percent(value):
    assert parse_limit(format_bytes(value), "size").value == pytest.approx(value, rel=5.1e-3)


@given(st.floats(1e-3, 1e3, **FINITE), st.sampled_from(["us", "ms", "s"]))
def test_exact_text_parses_exactly(number, unit):
    scale = {"us": 1e-3, "ms": 1.0, "s": 1e3}[unit]
    assert parse_limit(f"{number!r} {unit}", "latency") == Limit(number * scale, relative=False)


@given(st.floats(0.1, 500), st.floats(1e-3, 1e9))
def test_relative_limits_scale_the_dense_figure(percent, dense):
    limit = parse_limit(f"{percent!r}%", "size")
    assert math.isclose(limit.resolve(dense), percent * dense / 100, rel_tol=1e-12)
    assert Limit(3.0, relative=False).resolve(dense) == 3.0


@pytest.mark.parametrize(
    ("format", "value", "text"),
    [
        (format_ms, 1.2345, "1.23 ms"),
        (format_ms, 123.4, "123 ms"),
        (format_ms, None, "–"),
        (format_bytes, 999, "999 B"),
        (format_bytes, 9_876_543, "9.88 MB"),
        (format_bytes, 999_999, "1 MB"),
        (format_bytes, 123_400_000, "123 MB"),
        (format_bytes, None, "–"),
        (format_seconds, 59.6, "1m00s"),
        (format_seconds, 75, "1m15s"),
        (format_seconds, 3599.7, "1h00m"),
        (format_seconds, 7320, "2h02m"),
        (format_seconds, None, "–"),
    ],
)
def test_printing(format, value, text):
    assert format(value) == text
