"""Keys: fixed across processes and machines, equal for equal values, refused for odd ones."""

import hashlib
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocomp.core.hashing import canonical_json, content_key, file_digest

TEXT = st.text(max_size=5)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def test_the_key_is_the_digest_of_the_canonical_text():
    value = {"b": [1, 2.5, None], "a": "µ"}
    text = '{"a":"\\u00b5","b":[1,2.5,null]}'
    assert canonical_json(value) == text
    assert content_key(value) == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert content_key(value, length=40).startswith(content_key(value))


def test_the_same_in_another_process():
    code = "from autocomp.core.hashing import content_key; print(content_key({'b': 1, 'a': [2.5]}))"
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        other = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        assert other.stdout.strip() == content_key({"a": [2.5], "b": 1})


@given(st.dictionaries(TEXT, PLAIN, max_size=4))
def test_the_order_of_keys_does_not_count(data):
    assert content_key(dict(reversed(data.items()))) == content_key(data)


@given(PLAIN, PLAIN)
def test_different_text_different_key(one, other):
    assert (content_key(one) == content_key(other)) == (
        canonical_json(one) == canonical_json(other)
    )


@given(st.integers(-(2**52), 2**52))
def test_equal_numbers_have_equal_keys(number):
    assert content_key({"x": float(number)}) == content_key({"x": number})


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"x": float("-inf")}])
def test_refuses_what_is_not_finite(value):
    with pytest.raises(ValueError, match="JSON compliant"):
        content_key(value)


@pytest.mark.parametrize("value", [{1: 2}, {"x": {None: 1}}, object(), {"x": {1, 2}}, b"x"])
def test_refuses_what_is_not_plain(value):
    with pytest.raises(TypeError):
        content_key(value)


def test_file_digest(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc" * 100_000)
    assert file_digest(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()
