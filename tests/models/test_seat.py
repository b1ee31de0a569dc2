"""A mixer in its seat, in every layout: it is what is computed, and padding stays out of it."""

from __future__ import annotations

import copy

import pytest
import torch
from model_examples import EXAMPLES
from torch import Tensor

from autocomp.core.errors import InternalError
from autocomp.core.unit import Unit
from autocomp.models.mixers import MIXERS
from autocomp.models.mixers.protocol import Mixer, repeated
from autocomp.models.seat import install_mixer, mixer_of, mixer_shape
from autocomp.models.surgery import copy_for_surgery


class Softmax(Mixer):
    """Softmax attention as a mixer: nothing may change."""

    name, summary, paper = "softmax", "", ""

    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None
    ) -> Tensor:
        assert x.shape == (query.shape[0], query.shape[2], self.shape.hidden)
        tokens = query.shape[2]
        allowed = torch.ones(tokens, tokens, dtype=torch.bool)
        if self.shape.causal:
            allowed = allowed.tril()
        seen = allowed if real is None else allowed & real[:, None, None, :]
        heads = self.shape.heads
        return torch.nn.functional.scaled_dot_product_attention(
            query, repeated(heads, key), repeated(heads, value), attn_mask=seen
        )


class ValuesOnly(Mixer):
    """The mean of the values so far, or of all: queries and keys are not read."""

    name, summary, paper, reads = "values", "", "", ("value",)

    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None
    ) -> Tensor:
        return repeated(self.shape.heads, value)


def attention(name: str, layer: int = 1) -> Unit:
    return next(u for u in EXAMPLES[name].units() if u.name == f"layers.{layer}.attention")


@pytest.mark.parametrize("name", EXAMPLES)
def test_softmax_as_a_mixer_changes_nothing(name: str) -> None:
    teacher, unit = EXAMPLES[name].model(), attention(name)
    model = copy_for_surgery(teacher)
    mixer = Softmax(mixer_shape(unit))
    install_mixer(model, unit, mixer)
    assert mixer_of(model, unit) is mixer
    assert mixer_of(teacher, unit) is None
    inputs = EXAMPLES[name].inputs()
    expected, found = teacher(**inputs).logits, model(**inputs).logits
    real = inputs.get("attention_mask")
    if real is not None and found.ndim == 3:
        expected, found = expected[real.bool()], found[real.bool()]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "qwen3", "dinov2"])
def test_projections_that_are_not_read_are_gone(name: str) -> None:
    teacher, unit = EXAMPLES[name].model(), attention(name)
    model = copy_for_surgery(teacher)
    install_mixer(model, unit, ValuesOnly(mixer_shape(unit)))
    left = {parameter for parameter, _ in model.named_parameters()}
    for site in unit.sites:
        assert (f"{site.name}.weight" in left) is (site.role in ("value", "output"))
    assert torch.isfinite(model(**EXAMPLES[name].inputs()).logits).all()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_copy_has_a_mixer_of_its_own(name: str) -> None:
    model, unit = EXAMPLES[name].model(), attention(name)
    install_mixer(model, unit, MIXERS.get("elu")(mixer_shape(unit)))
    copied = copy.deepcopy(model)
    assert mixer_of(copied, unit) is not mixer_of(model, unit)
    inputs = EXAMPLES[name].inputs()
    torch.testing.assert_close(copied(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_padding_changes_no_real_token(name: str) -> None:
    model, unit = EXAMPLES[name].model(), attention(name)
    install_mixer(model, unit, MIXERS.get("elu")(mixer_shape(unit)))
    inputs = EXAMPLES[name].inputs()
    other = {
        **inputs,
        "input_ids": torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], 3),
    }
    one, two = model(**inputs).logits, model(**other).logits
    if one.ndim == 3:
        real = inputs["attention_mask"].bool()
        one, two = one[real], two[real]
    torch.testing.assert_close(one, two)


def test_other_scales_of_the_scores_are_refused() -> None:
    """gpt2 can divide them by the number of the layer as well."""
    model, unit = EXAMPLES["gpt2"].model(scale_attn_by_inverse_layer_idx=True), attention("gpt2")
    dense = copy_for_surgery(model)
    install_mixer(model, unit, Softmax(mixer_shape(unit)))
    with pytest.raises(InternalError, match="scores are scaled by"):
        model(**EXAMPLES["gpt2"].inputs())
    first = attention("gpt2", layer=0)  # over 1: as if it were not there
    install_mixer(dense, first, Softmax(mixer_shape(first)))
    assert torch.isfinite(dense(**EXAMPLES["gpt2"].inputs()).logits).all()
