"""Names and patterns only other rooms can judge, complained about at their line."""

import pytest

from autocomp.core.errors import SpecError
from autocomp.spec.loader import load_spec
from autocomp.spec.names import check_losses, check_names, match_rules

UNITS = ["embeddings"] + [f"layers.{i}.{kind}" for i in range(3) for kind in ("attention", "ffn")]
KNOWN = {
    "task.name": ("tasks", ["text-classification", "image-classification"]),
    "space[*].bits.method": ("operators", ["rtn", "gptq"]),
    "target.device": ("targets", ["cpu"]),
}


def test_known_names_pass(write):
    check_names(load_spec(write()), KNOWN)


def test_unknown_names_are_all_reported(write):
    path = write(
        ("[gptq, rtn]", "[gptqq, rtn]"), ("method: rtn", "method: int8"), ("text-cl", "txt-cl")
    )
    with pytest.raises(SpecError) as caught:
        check_names(load_spec(path), KNOWN)
    assert str(caught.value).splitlines() == [
        f"{path}:4 task.name: unknown 'txt-classification'. Did you mean 'text-classification'? "
        "Available: image-classification, text-classification. See: autocomp ls tasks",
        f"{path}:15 space[0].bits.method[0]: unknown 'gptqq'. Did you mean 'gptq'? "
        "Available: gptq, rtn. See: autocomp ls operators",
        f"{path}:18 space[1].bits.method: unknown 'int8'. "
        "Available: gptq, rtn. See: autocomp ls operators",
    ]


def test_a_default_is_placed_at_its_section(write):
    with pytest.raises(SpecError, match=r":1 target.device: unknown 'cpu'"):
        check_names(load_spec(write()), {"target.device": ("targets", ["gpu"])})


LOSSES = ["hidden", "logits", "reverse_kl", "task"]


def leads(name):
    return name in ("logits", "reverse_kl")


def test_sums_of_losses_are_read_as_one_whatever_the_order(write):
    text = "distill: {loss: [logits, reverse_kl + task+hidden]}"
    loaded = load_spec(write(("search: {trials: 5}", text)))
    assert loaded.spec.distill.loss == ["logits", "reverse_kl+hidden+task"]
    check_losses(loaded, LOSSES, leads)


def test_unknown_losses_and_sums_that_begin_wrong_are_all_reported(write):
    text = "distill: {loss: [logits, logits+hiden, task, hidden+logits]}"
    path = write(("search: {trials: 5}", text))
    with pytest.raises(SpecError) as caught:
        check_losses(load_spec(path), LOSSES, leads)
    assert str(caught.value).splitlines() == [
        f"{path}:19 distill.loss[1]: unknown 'hiden'. Did you mean 'hidden'? Available, also in "
        "sums (logits+hidden): hidden, logits, reverse_kl, task. See: autocomp ls losses",
        f"{path}:19 distill.loss[2]: task begins with task, which leaves open what the student "
        "answers. A sum begins with one of logits, reverse_kl: logits+task",
        f"{path}:19 distill.loss[3]: hidden+logits begins with hidden, which leaves open what the "
        "student answers. A sum begins with one of logits, reverse_kl: logits+hidden",
    ]


def test_the_last_matching_rule_holds(write):
    path = write(("embeddings\n", '"layers.1.*"\n'))
    assert match_rules(load_spec(path), UNITS) == {
        "layers.0.attention": 0,
        "layers.1.attention": 1,
        "layers.1.ffn": 1,
        "layers.2.attention": 0,
    }


def test_a_rule_without_a_unit_is_an_error(write):
    path = write(('"layers.*.attention"', '"layers.*.atention"'), ("embeddings", "layer.0.ffn"))
    with pytest.raises(SpecError) as caught:
        match_rules(load_spec(path), UNITS)
    listed = (
        "Units: embeddings, layers.0.attention … layers.2.attention, layers.0.ffn … layers.2.ffn"
    )
    assert str(caught.value).splitlines() == [
        f"{path}:12 space[0].match: no unit matches 'layers.*.atention'. "
        f"Did you mean 'layers.*.attention'? {listed}",
        f"{path}:17 space[1].match: no unit matches 'layer.0.ffn'. "
        f"Did you mean 'layers.*.ffn'? {listed}",
    ]


def test_patterns_respect_case(write):
    with pytest.raises(SpecError, match="no unit matches 'Embeddings'"):
        match_rules(load_spec(write(("embeddings", "Embeddings"))), UNITS)
