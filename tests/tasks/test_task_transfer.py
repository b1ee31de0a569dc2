"""Texts without labels: where they come from, that none of them is evaluated, what they do."""

import json

import numpy as np
import pytest
import torch

from autocomp.core.errors import DataError
from autocomp.tasks import make_task
from autocomp.tasks.inspect import inspect_data
from autocomp.tasks.protocol import NO_LABEL, Encoded
from autocomp.tasks.splits import uncounted
from autocomp.tasks.text_classification import TextClassification
from autocomp.tasks.vocabulary import token_counts

ARTICLES, LINES = 140, 3


@pytest.fixture
def articles(tmp_path):
    """`ARTICLES` texts of a headline and `LINES` lines; every line's first words name its text."""
    path = tmp_path / "articles.jsonl"
    rows = [
        {
            "text": "\n\n".join(f"w{i % 35} w{35 + i // 35}{' w39' * n}" for n in range(1 + LINES)),
            "label": "ab"[i % 2],
        }
        for i in range(ARTICLES)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def rows_of(encoded: Encoded) -> list[tuple[int, ...]]:
    return [tuple(row) for row in encoded.inputs["input_ids"].tolist()]


def test_further_lines_of_the_distil_split_and_of_nothing_else(articles, spec_of, bert_path):
    spec = spec_of("text-classification", articles, lines=1, transfer={"examples": 150})
    task = make_task(spec, bert_path)
    distil, transfer = task.splits["distil"], task.splits["transfer"]
    assert rows_of(transfer)[: len(distil)] == rows_of(distil)
    assert transfer.labels[: len(distil)].tolist() == distil.labels.tolist()
    assert (transfer.labels[len(distil) :] == NO_LABEL).all()
    assert len(transfer) == len(distil) + 150 == len(set(rows_of(transfer)))
    # an article is named by the two tokens after [CLS]
    heads = {name: {row[1:3] for row in rows_of(task.splits[name])} for name in task.splits}
    assert heads["transfer"] == heads["distil"]
    assert not heads["transfer"] & (heads["search"] | heads["report"] | heads["calibrate"])
    assert inspect_data(spec).describe() == "140 examples, 2 labels, 150 texts without labels"
    again = make_task(spec, bert_path)
    assert again.fingerprint("transfer") == task.fingerprint("transfer")
    plain = make_task(spec_of("text-classification", articles, lines=1), bert_path)
    for name in ("calibrate", "distil", "search", "report"):
        assert plain.fingerprint(name) == task.fingerprint(name)
    assert plain.fingerprint("transfer") == plain.fingerprint("distil")


def test_a_source_of_its_own_without_texts_that_are_examples(
    articles, spec_of, bert_path, tmp_path
):
    examples = [
        json.loads(line)["text"].splitlines()[0] for line in articles.read_text().splitlines()
    ]
    other = tmp_path / "other.jsonl"
    texts = [*examples, "w39 w39", " w39 w39 ", "", "w39 w1", "w1 w39"]
    other.write_text("\n".join(json.dumps({"body": text}) for text in texts))
    asked = {"source": str(other), "text": "body", "examples": 3}
    task = make_task(spec_of("text-classification", articles, lines=1, transfer=asked), bert_path)
    found = rows_of(task.splits["transfer"])[len(task.splits["distil"]) :]
    assert len(set(found)) == 3
    asked["examples"] = 4
    spec = spec_of("text-classification", articles, lines=1, transfer=asked)
    message = r"other\.jsonl has 3 texts that are no examples yet, but .*asks for 4\. Lower"
    for look in (lambda: make_task(spec, bert_path), lambda: inspect_data(spec)):
        with pytest.raises(DataError, match=message):
            look()


def test_too_few_further_lines_say_how_many_there_are(articles, spec_of, bert_path):
    """An eighth of the distil split lends none: candidates are screened on that."""
    spec = spec_of("text-classification", articles, lines=1, transfer={"examples": 181})
    with pytest.raises(DataError, match=r"task\.data\.lines: 1, has 159 texts .* asks for 181"):
        inspect_data(spec)


def test_nothing_is_counted_of_what_candidates_are_screened_on(articles, spec_of, bert_path):
    """So a pruned vocabulary spells out as much of it as of what it has not seen."""
    asked = {"examples": 150}
    task = make_task(spec_of("text-classification", articles, lines=1, transfer=asked), bert_path)
    screened = uncounted(len(task.splits["distil"]))
    assert screened > 0
    before = token_counts(task, 1000)
    task.splits["transfer"].inputs["input_ids"][:screened] = 999
    assert token_counts(task, 1000).tolist() == before.tolist()
    task.splits["transfer"].inputs["input_ids"][screened] = 999
    assert token_counts(task, 1000)[999] > 0


@pytest.mark.parametrize("task", ["image-classification", "language-modeling"])
def test_for_texts_with_labels_alone(task, articles, spec_of):
    with pytest.raises(ValueError, match=f"{task} learns from more of its own data: raise"):
        spec_of(task, articles, lines=1, transfer={"examples": 10})


def test_the_loss_is_of_the_labelled_alone():
    logits = torch.randn(4, 3, generator=torch.manual_seed(0), requires_grad=True)
    labels = torch.tensor([2, NO_LABEL, 0, NO_LABEL])
    task = TextClassification({}, ("a", "b", "c"), 3, 1)
    wanted = -(logits.log_softmax(-1)[0, 2] + logits.log_softmax(-1)[2, 0]) / 2
    torch.testing.assert_close(task.loss(logits, labels), wanted)
    nothing = task.loss(logits, torch.full((4,), NO_LABEL))
    nothing.backward()
    assert nothing.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_tokens_are_counted_in_it(articles, spec_of, bert_path):
    """What is kept of a vocabulary covers texts like those a student learns from."""

    def count(**more):
        task = make_task(spec_of("text-classification", articles, lines=1, **more), bert_path)
        return token_counts(task, 1000)

    more = count(transfer={"examples": 100}) - count()
    assert more.sum() > 100
    assert np.all(more >= 0)
