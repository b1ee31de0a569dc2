"""Pruned vocabularies: rewritten tokenizers read what they can as before, and anything else too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

from autocomp.core.errors import InternalError, ModelError
from autocomp.models.load import load_tokenizer_files
from autocomp.models.pruned_table import PrunedTable, model_vocabulary
from autocomp.models.tokenizer_files import (
    read_tokenizer,
    required_ids,
    token_ids,
    unknown_id,
    write_pruned,
)
from autocomp.models.vocabulary import Vocabulary, chosen_vocabulary, load_vocabulary

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
CORPUS = [
    "the bank raised its forecast and shares rose sharply on monday",
    "the striker scored twice as the visitors were beaten at home",
    "a film about banking wins the festival and the critics agree",
    "forecasters expect rain on sunday before a warmer week begins",
] * 4
UNSEEN = "zebras quietly overtake bankers, forecasting nothing"


def _tokenizer(kind: str) -> Tokenizer:
    if kind == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=SPECIAL)
    elif kind == "WordLevel":
        tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL)
    elif kind == "BPE":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False
        )
    trainer.show_progress = False
    tokenizer.train_from_iterator(CORPUS, trainer)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    if kind == "BPE":
        tokenizer.post_processor = processors.RobertaProcessing(
            ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
        )
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            special_tokens=[(name, ids[name]) for name in ("[CLS]", "[SEP]")],
        )
    tokenizer.enable_padding(pad_id=ids["[PAD]"], pad_token="[PAD]")
    return tokenizer


def _pruned(kind: str, root: Path) -> tuple[Tokenizer, Tokenizer, Vocabulary]:
    """A tokenizer, what is left of it for the first sentence, and what that keeps."""
    original = _tokenizer(kind)
    source = root / "source"
    source.mkdir()
    original.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 64})
    )
    data = read_tokenizer(source)
    used = original.encode(CORPUS[0]).ids
    vocabulary = chosen_vocabulary(
        used, sorted(required_ids(data, used)), unknown_id(data), original.get_vocab_size()
    )
    write_pruned(source, vocabulary, root / "pruned")
    return original, Tokenizer.from_file(str(root / "pruned" / "tokenizer.json")), vocabulary


@pytest.mark.parametrize("kind", ["WordPiece", "WordLevel", "BPE", "Unigram"])
def test_kept_text_reads_alike_and_the_rest_reads_at_all(kind, tmp_path) -> None:
    original, pruned, vocabulary = _pruned(kind, tmp_path)
    assert pruned.get_vocab_size() == len(vocabulary.kept) < original.get_vocab_size()
    for text in (CORPUS[0], "shares rose on monday", "monday shares the bank"):
        before, after = original.encode(text), pruned.encode(text)
        if set(before.ids) <= set(vocabulary.kept):
            assert vocabulary.original(np.array(after.ids)).tolist() == before.ids
            assert after.tokens == before.tokens
    assert pruned.encode(CORPUS[0]).tokens[0] == "[CLS]"
    for text in (*CORPUS, UNSEEN):
        ids = pruned.encode(text).ids
        assert max(ids) < len(vocabulary.kept)
        unknown = vocabulary.new_ids[vocabulary.unknown]
        if kind != "WordLevel":  # spelt out, as far as the original knew the letters
            known = original.encode(text).ids.count(vocabulary.unknown)
            assert ids.count(unknown) <= known


@pytest.mark.parametrize("kind", ["WordPiece", "BPE"])
def test_transformers_reads_the_files(kind, tmp_path) -> None:
    """The same ids, and the padding token where it now is."""
    _, pruned, vocabulary = _pruned(kind, tmp_path)
    pruned.no_padding()
    loaded = load_tokenizer_files(tmp_path / "pruned")
    for text in (*CORPUS[:4], UNSEEN):
        assert loaded(text)["input_ids"] == pruned.encode(text).ids
    padding = token_ids(read_tokenizer(tmp_path / "source"))["[PAD]"]
    assert loaded.pad_token_id == vocabulary.new_ids[padding]


def test_bpe_keeps_what_kept_tokens_are_merged_from(tmp_path) -> None:
    original, pruned, vocabulary = _pruned("BPE", tmp_path)
    word = max(original.encode(CORPUS[0]).tokens[1:-1], key=len)
    assert len(word) > 3
    assert word in pruned.get_vocab()
    assert len(vocabulary.kept) > len(set(original.encode(CORPUS[0]).ids) | set(range(4)))


def test_a_tokenizer_that_cannot_be_rewritten_is_refused(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"leave structure\.vocabulary out"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Strange"}}')
    with pytest.raises(ModelError, match="a Strange tokenizer cannot be pruned"):
        read_tokenizer(tmp_path)


def test_vocabulary_maps_there_and_back(tmp_path) -> None:
    vocabulary = Vocabulary((0, 2, 5), unknown=2, size=7)
    assert vocabulary.row_of.tolist() == [0, 1, 1, 1, 1, 2, 1]
    assert vocabulary.original(np.array([[2, 0]])).tolist() == [[5, 0]]
    assert load_vocabulary(tmp_path) is None
    vocabulary.save(tmp_path)
    assert load_vocabulary(tmp_path) == vocabulary
    for kept, unknown in (((0, 5, 2), 2), ((0, 7), 0), ((0, 1), 2), ((), 0)):
        with pytest.raises(InternalError):
            Vocabulary(kept, unknown, 7)


def test_a_pruned_table_answers_original_ids() -> None:
    table = nn.Embedding(7, 4)
    vocabulary = Vocabulary((0, 2, 5), unknown=2, size=7)
    kept = torch.tensor(vocabulary.kept)
    small = nn.Embedding(3, 4, padding_idx=0)
    small.weight = nn.Parameter(table.weight.detach()[kept])
    pruned = PrunedTable(small, torch.from_numpy(vocabulary.row_of), kept)
    ids = torch.tensor([[0, 5, 2], [1, 3, 6]])
    expected = table(torch.tensor([[0, 5, 2], [2, 2, 2]]))
    torch.testing.assert_close(pruned(ids), expected)
    assert pruned.padding_idx == 0
    assert model_vocabulary(nn.Sequential(pruned)) == vocabulary
    assert model_vocabulary(nn.Sequential(table)) is None
