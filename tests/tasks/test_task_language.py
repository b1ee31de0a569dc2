"""Language modelling beyond its contract: chunks, quality = exp(−NLL)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from autocomp.core.errors import DataError
from autocomp.models.load import load_model
from autocomp.tasks import DRAWN, make_task


@pytest.fixture
def task(llama_path, corpus_txt, spec_of):
    return make_task(spec_of("language-modeling", corpus_txt), llama_path)


@pytest.fixture(scope="module")
def model(llama_path):
    return load_model(llama_path, "language-modeling")


def test_chunks_are_disjoint_pieces_of_the_text(task, llama_path, corpus_txt):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama_path)
    stream = [tokenizer.convert_tokens_to_ids(word) for word in corpus_txt.read_text().split()]
    positions = {tuple(stream[i : i + 10]): i for i in range(0, len(stream) - 9, 10)}
    starts = []
    for name in DRAWN:
        encoded = task.splits[name]
        assert encoded.inputs["input_ids"].shape == encoded.labels.shape == (len(encoded), 10)
        assert np.array_equal(encoded.labels, encoded.inputs["input_ids"])
        starts += [positions[tuple(row)] for row in encoded.labels.tolist()]
    assert len(starts) == len(set(starts)) == 120
    assert starts != sorted(starts)


def test_quality_is_exp_of_minus_cross_entropy(task, model):
    ids = torch.from_numpy(task.splits["search"].labels)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten()).item()
    quality = task.score(logits.numpy(), "search")
    assert quality.value == pytest.approx(np.exp(-entropy), rel=1e-9)
    assert quality.metric_value == pytest.approx(np.exp(entropy), rel=1e-9)
    assert quality.metric == "perplexity"
    assert task.loss(logits, ids).item() == pytest.approx(entropy, rel=1e-5)
    perfect = np.zeros((20, 10, 44), dtype=np.float32)
    np.put_along_axis(perfect[:, :-1], ids.numpy()[:, 1:, None], 100.0, axis=-1)
    assert task.score(perfect, "search").value == pytest.approx(1)


def test_evaluation_keeps_no_logits(task, model):
    def run(inputs):
        assert inputs["input_ids"].shape == (3, 10)
        with torch.no_grad():
            return task.logits(model, {"input_ids": torch.from_numpy(inputs["input_ids"])}).numpy()

    assert task.evaluate(run, "search").logits is None


def test_held_out_text_too_short_is_not_replaced_by_other(
    llama_path, corpus_txt, spec_of, tmp_path
):
    (tmp_path / "few.txt").write_text("w1 w2 w3")
    few = {"source": str(tmp_path / "few.txt")}
    with pytest.raises(DataError, match=r"has 0 held-out chunks of 10 tokens, but"):
        make_task(spec_of("language-modeling", corpus_txt, held_out=few), llama_path)
    same = {"source": str(corpus_txt)}
    with pytest.raises(DataError, match=r"has \d+ chunks of 10 tokens, but .*calibrate"):
        make_task(spec_of("language-modeling", corpus_txt, held_out=same, search=70), llama_path)


def test_too_little_text_says_how_many_chunks_there_are(llama_path, corpus_txt, spec_of):
    with pytest.raises(DataError, match=r"has 270 chunks of 10 tokens, but"):
        make_task(spec_of("language-modeling", corpus_txt, distil=999), llama_path)
