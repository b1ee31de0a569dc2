"""Places in a spec: dotted paths and lines, against a search of the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocomp.core.errors import SpecError
from autocomp.spec.source import SpecSource, dotted, parse_dotted

WORDS = st.from_regex(r"[a-z_]{1,6}[0-9]?", fullmatch=True)
PARTS = st.builds(
    lambda first, rest: (first, *rest), WORDS, st.lists(WORDS | st.integers(0, 40), max_size=4)
).map(tuple)


@given(PARTS)
def test_dotted_paths_round_trip(parts):
    assert parse_dotted(dotted(parts)) == parts


@pytest.mark.parametrize("text", ["", ".", "a.", ".a", "a[x]", "a[]", "[0]", "a[0]b", "a b", "a=b"])
def test_what_is_no_path(text):
    with pytest.raises(SpecError, match="no path into a spec"):
        parse_dotted(text)


def test_lines(write):
    path = write()
    source = SpecSource.read(path)
    lines = path.read_text().splitlines()
    for place, text in [
        ("version", "version"),
        ("task.data.label", "label"),
        ("budget.size", "size"),
        ("space[0]", '"layers.*'),
        ("space[0].bits.weights[2]", "weights: [dense, 8, 4]"),
        ("space[1].match", "embeddings"),
        ("search.trials", "trials"),
    ]:
        assert text in lines[source.line(place) - 1]


def test_what_is_not_written_is_placed_at_what_surrounds_it(write):
    source = SpecSource.read(write())
    assert source.line("space[1].structure.heads") == source.line("space[1]")
    assert source.line("distill.tokens") == 1


def test_errors_read_file_line_place(write):
    path = write()
    source = SpecSource.read(path)
    error = source.error_at("space[0].bits.method", "unknown 'x'")
    assert str(error) == f"{path}:15 space[0].bits.method: unknown 'x'"
    both = source.error([("search.trials", "two"), ("model.source", "one")])
    assert str(both) == f"{path}:2 model.source: one\n{path}:19 search.trials: two"


def test_what_was_overridden_is_named_as_such(write):
    source = SpecSource.read(write())
    source.override({"space[0].bits": {"method": "x"}})
    assert source.where("space[0].bits.method") == "--set space[0].bits.method"
    assert source.where("space[0].match").endswith("spec.yaml:12 space[0].match")
