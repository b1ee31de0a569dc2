"""The teacher: fitted once, kept by content, rebuilt when damaged."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from scipy.special import logsumexp
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
)

from autocomp.core.errors import ModelError, StorageError, UserError
from autocomp.models.load import load_model
from autocomp.models.sources import read_config
from autocomp.spec.task import TeacherSection
from autocomp.targets.skeleton_store import skeleton_key
from autocomp.tasks import make_task
from autocomp.tasks import teacher as teacher_module
from autocomp.tasks.fitting import _HEAD_PENALTY, _logistic_regression
from autocomp.tasks.teacher import make_teacher, teacher_logits

FULL = {"fit": "full", "epochs": 1, "lr": 3e-3, "batch": 16}


@pytest.fixture
def spec(text_csv, spec_of):
    return spec_of("text-classification", text_csv, teacher=FULL)


@pytest.fixture
def task(spec, bert_path):
    return make_task(spec, bert_path)


def accuracy(path, task, split="search"):
    model = load_model(path, task.name, task.num_labels)
    return task.score(teacher_logits(model, task, split), split).value


def test_full_fit_learns_and_is_kept(text_csv, spec_of, bert_path, tmp_path):
    spec = spec_of("text-classification", text_csv, teacher=FULL | {"epochs": 20})
    task = make_task(spec, bert_path)
    steps = []
    path = make_teacher(spec, task, bert_path, tmp_path, lambda *step: steps.append(step))
    assert steps == [(i, 80) for i in range(1, 81)]
    assert accuracy(path, task) >= 0.9  # three labels, told by one word
    config = json.loads((path / "config.json").read_text())
    assert config["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    model = AutoModelForSequenceClassification.from_pretrained(path)
    assert model.config.label2id == {"blue": 0, "green": 1, "red": 2}
    assert AutoTokenizer.from_pretrained(path)("w1")["input_ids"][:3] == [2, 5, 3]
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert make_teacher(spec, task, bert_path, tmp_path, pytest.fail) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_same_spec_gives_the_same_weights(spec, task, bert_path, tmp_path):
    torch.manual_seed(1)
    first = make_teacher(spec, task, bert_path, tmp_path / "a")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = make_teacher(spec, task, bert_path, tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), state)
    assert first.name == second.name
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize("change", [{"teacher": FULL | {"lr": 1e-3}}, {"seed": 1}, {"distil": 59}])
def test_other_settings_or_data_make_another_teacher(
    change, spec, task, text_csv, spec_of, bert_path, tmp_path, monkeypatch
):
    monkeypatch.setattr(teacher_module, "fit_full", lambda *_, **__: None)
    path = make_teacher(spec, task, bert_path, tmp_path)
    other = spec_of("text-classification", text_csv, **({"teacher": FULL} | change))
    assert make_teacher(other, make_task(other, bert_path), bert_path, tmp_path) != path


def test_damage_is_noticed_and_repaired(spec, task, bert_path, tmp_path, caplog):
    path = make_teacher(spec, task, bert_path, tmp_path)
    weights = path / "model.safetensors"
    good = weights.read_bytes()
    for damage in (good[:-1] + bytes([good[-1] ^ 1]), good[:100]):
        weights.write_bytes(damage)
        with caplog.at_level(logging.WARNING):
            assert make_teacher(spec, task, bert_path, tmp_path) == path
        assert "model.safetensors has changed" in caplog.text
        assert weights.read_bytes() == good
    (path / "teacher.json").unlink()
    assert make_teacher(spec, task, bert_path, tmp_path) == path
    assert (path / "teacher.json").exists()


def test_a_full_disk_leaves_nothing_behind(spec, task, bert_path, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_module, "fit_full", lambda *_, **__: None)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher_module, "_sync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        make_teacher(spec, task, bert_path, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fit_none_takes_a_model_with_a_head_as_it_is(
    spec, task, text_csv, spec_of, bert_path, tmp_path
):
    fitted = make_teacher(spec, task, bert_path, tmp_path)
    as_is = spec_of("text-classification", text_csv, teacher={"fit": "none"})
    again = make_task(as_is, fitted)
    assert make_teacher(as_is, again, fitted, tmp_path) == fitted
    assert again.label_names == task.label_names
    assert accuracy(fitted, again) == accuracy(fitted, task)
    with pytest.raises(ModelError, match=r"BertModel\) has no classification head.*fit: full"):
        make_teacher(as_is, again, bert_path, tmp_path)


@pytest.mark.parametrize(
    "name",
    ["bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.1.output.LayerNorm.weight"],
)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_named_whether_fitted_or_not(
    name, bad, task, text_csv, spec_of, bert_path, tmp_path, monkeypatch
):
    monkeypatch.setattr(teacher_module, "fit_full", lambda *_, **__: None)
    settings = spec_of("text-classification", text_csv, teacher=FULL)
    fitted = make_teacher(settings, task, bert_path, tmp_path / "cache")
    tensors = load_file(fitted / "model.safetensors")
    broken = shutil.copytree(fitted, tmp_path / "broken")
    tensors[name][-1] = bad
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    for teacher in ({"fit": "none"}, FULL):
        asked = spec_of("text-classification", text_csv, teacher=teacher)
        with pytest.raises(ModelError, match=f"{name} holds NaN or infinity") as caught:
            make_teacher(asked, make_task(asked, broken), broken, tmp_path / "cache")
        assert caught.value.exit_status == 2


OWN_CODE = """
from transformers import BertForSequenceClassification

class Doubled(BertForSequenceClassification):
    def forward(self, *arguments, **named):
        outputs = super().forward(*arguments, **named)
        outputs.logits = outputs.logits * FACTOR
        return outputs
"""


@pytest.fixture
def own_code(bert_path, tmp_path):
    """A BERT with a head whose class comes in a file of its own."""

    def write(factor):
        path = tmp_path / f"own{factor}"
        shutil.copytree(bert_path, path)
        config = read_config(path)
        config["auto_map"] = {"AutoModelForSequenceClassification": "modelling.Doubled"}
        (path / "config.json").write_text(json.dumps(config))
        (path / "modelling.py").write_text(OWN_CODE.replace("FACTOR", str(factor)))
        return path

    return write


def test_a_teacher_of_remote_code_carries_it_and_asks_for_trust(
    own_code, text_csv, spec_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(teacher_module, "fit_full", lambda *_, **__: None)
    spec = spec_of("text-classification", text_csv, teacher=FULL)
    trusting = spec.model_copy(
        update={"model": spec.model.model_copy(update={"trust_remote_code": True})}
    )
    source = own_code(2)
    task = make_task(spec, source)
    with pytest.raises(ModelError, match="trust_remote_code: true"):
        make_teacher(spec, task, source, tmp_path / "cache")
    path = make_teacher(trusting, task, source, tmp_path / "cache")
    assert (path / "modelling.py").exists()
    shutil.rmtree(source)  # the teacher stands by itself
    with pytest.raises(ModelError, match="trust_remote_code: true"):
        load_model(path, task.name, task.num_labels)
    model = load_model(path, task.name, task.num_labels, trust_remote_code=True)
    assert type(model).__name__ == "Doubled"
    inputs = next(task.batches("search", 4))
    stock = BertForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        assert torch.allclose(task.logits(model, inputs), 2 * stock(**inputs_of(inputs)).logits)
    # Other code is another teacher and another skeleton, though the weights are the same.
    other_source = own_code(3)
    other = make_teacher(trusting, task, other_source, tmp_path / "cache")
    assert other != path
    tripled = load_model(other, task.name, task.num_labels, trust_remote_code=True)
    assert skeleton_key(tripled, [], task) != skeleton_key(model, [], task)


def inputs_of(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def test_head_fit_on_images_leaves_the_encoder_alone(image_npz, spec_of, vit_path, tmp_path):
    spec = spec_of(
        "image-classification",
        image_npz,
        workload={"image": 16},
        image="x_train",
        label="y_train",
        teacher={"fit": "head"},
    )
    task = make_task(spec, vit_path)
    steps = []
    path = make_teacher(spec, task, vit_path, tmp_path, lambda *step: steps.append(step))
    assert steps == [(1, 2), (2, 2)]
    assert accuracy(path, task) >= 0.9
    before = load_model(vit_path, task.name, 2).state_dict()
    after = load_model(path, task.name, 2).state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    processor = json.loads((path / "preprocessor_config.json").read_text())
    assert processor["crop_size"] == {"height": 16, "width": 16}
    assert make_task(spec, path).fingerprint("search") == task.fingerprint("search")


def test_logistic_regression_finds_the_minimum_scipy_finds():
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(40, 5)), generator.integers(0, 3, size=40)

    def objective(flat):
        weight, bias = flat[:15].reshape(3, 5), flat[15:]
        logits = features @ weight.T + bias
        entropy = (logsumexp(logits, axis=1) - logits[range(40), labels]).mean()
        return entropy + _HEAD_PENALTY / 2 * (weight**2).sum()

    weight, bias = _logistic_regression(torch.from_numpy(features), torch.from_numpy(labels), 3)
    ours = objective(np.concatenate([weight.numpy().ravel(), bias.numpy()]))
    best = minimize(objective, np.zeros(18), tol=1e-12)
    assert ours == pytest.approx(best.fun, rel=1e-7)


def test_head_makes_no_sense_for_a_language_model(corpus_txt, spec_of, llama_path, tmp_path):
    spec = spec_of("language-modeling", corpus_txt, teacher={"fit": "head"})
    task = make_task(spec, llama_path)
    with pytest.raises(UserError, match="Allowed here: none, full"):
        make_teacher(spec, task, llama_path, tmp_path)
    as_is = spec_of("language-modeling", corpus_txt, teacher={"fit": "none"})
    assert make_teacher(as_is, task, llama_path, tmp_path) == llama_path
    full = spec_of("language-modeling", corpus_txt, teacher=FULL | {"lr": 1e-2, "epochs": 4})
    fitted = make_teacher(full, task, llama_path, tmp_path)
    loss = {}
    for path in (llama_path, fitted):
        model = load_model(path, task.name)
        batch = next(task.batches("distil", 60))
        with torch.no_grad():
            loss[path] = task.loss(task.logits(model, batch), batch["labels"]).item()
    assert loss[fitted] < loss[llama_path]


def test_a_fitted_teacher_has_positions_for_what_it_was_fitted_on(
    corpus_txt, spec_of, llama_path, tmp_path
):
    longer = spec_of(
        "language-modeling",
        corpus_txt,
        teacher=FULL,
        workload={"sequence": 40},
        **{"calibrate": 2, "distil": 8, "search": 2, "report": 2},
    )
    task = make_task(longer, llama_path)
    fitted = make_teacher(longer, task, llama_path, tmp_path)
    assert read_config(llama_path)["max_position_embeddings"] == 32
    assert read_config(fitted)["max_position_embeddings"] == 40
    again = longer.task.model_copy(update={"teacher": TeacherSection(fit="none")})
    as_is = make_task(longer.model_copy(update={"task": again}), fitted)
    assert as_is.splits["search"].inputs["input_ids"].shape == (2, 40)


def test_stored_logits_are_mapped_and_remade_when_cut_off(
    llama_path, corpus_txt, spec_of, tmp_path
):
    task = make_task(spec_of("language-modeling", corpus_txt), llama_path)
    model = load_model(llama_path, task.name)
    cache = tmp_path / "search.npy"
    steps = []
    stored = teacher_logits(
        model, task, "search", cache, batch=6, progress=lambda *step: steps.append(step)
    )
    assert steps == [(6, 20), (12, 20), (18, 20), (20, 20)]
    assert isinstance(stored, np.memmap)
    plain = teacher_logits(model, task, "search", batch=6)
    assert np.array_equal(stored, plain)
    teacher_logits(model, task, "search", cache, progress=pytest.fail)
    raw = cache.read_bytes()
    cache.write_bytes(raw[: len(raw) // 2])
    assert np.array_equal(teacher_logits(model, task, "search", cache, batch=6), plain)
    with pytest.raises(ValueError, match="read-only"):
        stored[0] = 0
