"""Text classification beyond its contract: encoding, widths, scores, errors, vocabularies."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from scipy.special import softmax
from transformers import PreTrainedTokenizerFast

from autocomp.core.errors import DataError, InternalError, UserError
from autocomp.models.load import load_model
from autocomp.tasks import DRAWN, TASKS, Encoded, make_task
from autocomp.tasks.base import check_sequence
from autocomp.tasks.fitting import classification_head
from autocomp.tasks.text_classification import TextClassification
from autocomp.tasks.vocabulary import example_counts, task_vocabulary, token_counts


@pytest.fixture
def task(bert_path, text_csv, spec_of):
    return make_task(spec_of("text-classification", text_csv), bert_path)


@pytest.fixture(scope="module")
def model(bert_path):
    return load_model(bert_path, "text-classification", 3)


def runner(model):
    def run(inputs):
        with torch.no_grad():
            return model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits.numpy()

    return run


def test_encoding_equals_the_tokenizer_one_by_one(bert_path, text_csv, spec_of, task):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bert_path)
    known = {
        tuple(tokenizer(line.rpartition(",")[0], truncation=True, max_length=10)["input_ids"][:10])
        for line in text_csv.read_text().splitlines()[1:]
    }
    assert {name: len(task.splits[name]) for name in DRAWN} == {
        "calibrate": 20,
        "distil": 60,
        "search": 20,
        "report": 20,
    }
    lengths = set()
    for encoded in task.splits.values():
        ids, mask = encoded.inputs["input_ids"], encoded.inputs["attention_mask"]
        assert ids.shape == mask.shape == (len(encoded), 10)
        assert ids.dtype == mask.dtype == encoded.labels.dtype == np.int64
        assert (ids[mask == 0] == 0).all()
        assert (np.diff(mask, axis=1) <= 0).all()  # padding is on the right
        for row, real in zip(ids, mask.sum(axis=1), strict=True):
            assert tuple(row[:real]) in known
            lengths.add(int(real))
        # the first word tells the label: word i is token 4 + i
        assert np.array_equal(
            ids[:, 1] - 4, [("blue", "green", "red").index(c) for c in named(task, encoded)]
        )
    assert len(lengths) > 3
    assert max(lengths) == 10


def named(task, encoded):
    return [task.label_names[i] for i in encoded.labels]


def test_a_batch_is_as_wide_as_its_longest_text(task):
    mask = task.splits["distil"].inputs["attention_mask"]
    for seed in (None, 0):
        batches = list(task.batches("distil", 7, seed=seed, index=True))
        assert sum(task.tokens(batch) for batch in batches) == mask.sum()
        for batch in batches:
            assert batch["input_ids"].shape[1] == mask[batch["index"].numpy()].sum(axis=1).max()
    assert {b["input_ids"].shape[1] for b in task.batches("distil", 7, trim=False)} == {10}


def test_shuffled_batches_waste_little_and_differ_by_seed(task):
    def padded(seed):
        batches = list(task.batches("distil", 8, seed=seed))
        return sum(b["input_ids"].numel() for b in batches), [b["labels"].tolist() for b in batches]

    plain, _ = padded(None)
    first, order = padded(0)
    assert first < plain
    assert order == padded(0)[1]
    assert order != padded(1)[1]


def test_score_counts_right_answers(task):
    labels = task.splits["report"].labels
    perfect = np.eye(3, dtype=np.float32)[labels]
    assert task.score(perfect, "report").value == 1
    wrong = perfect.copy()
    wrong[:5] = np.roll(perfect[:5], 1, axis=1)
    quality = task.score(wrong, "report")
    assert quality.value == quality.metric_value == 0.75
    assert quality.per_example.tolist() == [0.0] * 5 + [1.0] * 15
    assert quality.metric_json() == {"name": "accuracy", "value": 0.75}
    assert task.aggregate(quality.per_example[:10]) == 0.5


def test_broken_logits_are_refused(task):
    with pytest.raises(InternalError, match="not finite for 1 of 20"):
        task.score(np.where(np.arange(20)[:, None] == 3, np.nan, np.zeros((20, 3))), "search")
    with pytest.raises(InternalError, match="19 rows of logits for 20 examples"):
        task.score(np.zeros((19, 3)), "search")
    with pytest.raises(InternalError, match="500 teacher logits for 20 examples"):
        task.evaluate(lambda inputs: np.zeros((3, 3)), "search", teacher=np.zeros((500, 3)))
    with pytest.raises(InternalError, match="not finite"):
        task.evaluate(lambda inputs: np.full((3, 3), np.inf), "search")


def test_loss_is_the_negative_log_probability_of_the_label(task):
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 1])
    expected = -np.log(softmax(logits.numpy(), axis=1)[range(4), labels.numpy()]).mean()
    assert task.loss(logits, labels).item() == pytest.approx(expected, rel=1e-5)


def test_errors_name_what_is_wrong(bert_path, text_csv, spec_of, task):
    with pytest.raises(DataError, match=r"has 200 examples, but .* distil 500"):
        make_task(spec_of("text-classification", text_csv, distil=500), bert_path)
    long = spec_of("text-classification", text_csv, workload={"sequence": 33})
    with pytest.raises(UserError, match=r"33 tokens, but the model has 32 positions"):
        make_task(long, bert_path)
    with pytest.raises(UserError, match=r"Did you mean 'text-classification'\?"):
        make_task(spec_of("text-clasification", text_csv), bert_path)
    with pytest.raises(DataError, match=r"label 'blue' is none of the model's"):
        make_task(spec_of("text-classification", text_csv, teacher={"fit": "none"}), bert_path)


def test_registry_names_every_task():
    assert TASKS.names() == ["image-classification", "language-modeling", "text-classification"]
    assert all(TASKS.get(name).name == name and TASKS.get(name).summary for name in TASKS)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 0}, 513),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        ({"model_type": "llama", "max_position_embeddings": 2048}, 2048),
    ],
)
def test_positions_are_counted_as_the_model_counts_them(config, positions):
    """RoBERTa's first token stands at pad_token_id + 1; GPT-2 has its own word for positions."""
    check_sequence(positions, config)
    with pytest.raises(UserError, match=f"the model has {positions} positions"):
        check_sequence(positions + 1, config)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (transformers.BertConfig, "classifier"),
        (transformers.DistilBertConfig, "classifier"),
        (transformers.RobertaConfig, "classifier.out_proj"),
    ],
)
def test_the_head_that_is_fitted_gives_the_logits(kind, path):
    config = kind(vocab_size=20, num_labels=5)
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads = 8, 1, 2
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    head = classification_head(model)
    assert head is model.get_submodule(path)
    assert head.out_features == 5


def test_token_counts_are_those_of_real_tokens() -> None:
    """Of calibrate and the transfer set alone; padding counts once, so that its row is kept."""
    ids, mask = np.array([[5, 6, 5, 0], [6, 0, 0, 0]]), np.array([[1, 1, 1, 0], [1, 0, 0, 0]])
    seen = Encoded({"input_ids": ids, "attention_mask": mask}, np.zeros(2, np.int64))
    other = Encoded({"input_ids": ids + 1, "attention_mask": mask}, np.zeros(2, np.int64))
    splits = {"calibrate": seen, "transfer": seen, "search": other, "report": other}
    splits["distil"] = seen
    task = TextClassification(splits, ("a", "b"), 2, 1)
    assert token_counts(task, 9).tolist() == [1, 0, 0, 0, 0, 4, 4, 0, 0]
    assert example_counts(task, 9).tolist() == [2, 0, 0, 0, 0, 2, 4, 0, 0]


def test_a_pruned_vocabulary_leaves_roberta_its_padding_id(
    bert_path, text_csv, spec_of, tmp_path
) -> None:
    """Positions are counted from it in the exported graph, which takes the new ids."""
    path = shutil.copytree(bert_path, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    spec, rows = spec_of("text-classification", text_csv), config["vocab_size"] + 6
    rare = rows - 1
    assert rare not in task_vocabulary(spec, path, rows).kept
    changed = {**config, "model_type": "roberta", "pad_token_id": rare}
    changed["max_position_embeddings"] = rows + 40
    (path / "config.json").write_text(json.dumps(changed))
    assert task_vocabulary(spec, path, rows).new_ids[rare] == rare


def test_computed_positions_can_be_continued_a_table_cannot():
    rotary = {"model_type": "llama", "max_position_embeddings": 512}
    check_sequence(2048, rotary, trained=True)
    with pytest.raises(UserError, match=r"continued to more: task.teacher: \{fit: full\}"):
        check_sequence(2048, rotary)
    for table in (
        {"model_type": "bert", "max_position_embeddings": 512},
        {"model_type": "gpt2", "n_positions": 512},
    ):
        with pytest.raises(UserError, match=r"Use 512 or fewer$"):
            check_sequence(2048, table, trained=True)
