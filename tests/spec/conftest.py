"""A spec that is right, to be made wrong in one place."""

import pytest

GOOD = """\
version: 1
model: {source: some/model}
task:
  name: text-classification
  data:
    source: some-dataset
    label: topic
budget:
  latency: 20%
  size: 12 MB
space:
  - match: "layers.*.attention"
    structure: {heads: [1.0, 0.5], skip: true}
    bits:
      method: [gptq, rtn]
      weights: [dense, 8, 4]
  - match: embeddings
    bits: {method: rtn, weights: [8]}
search: {trials: 5}
"""


@pytest.fixture
def good():
    """The text of a spec that is right."""
    return GOOD


@pytest.fixture
def write(tmp_path):
    """Write a spec, `GOOD` with replacements (old, new), and return its path."""

    def run(*replacements, text=GOOD):
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "spec.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return run
