"""Does the tokenizer shipped with a pruned vocabulary read real texts as the original did?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from autocomp.core.errors import InternalError
from autocomp.export.companions import Companions
from autocomp.models.tokenizer_files import TOKENIZER
from autocomp.models.vocabulary import Vocabulary
from autocomp.targets.protocol import Artifact, Target

_RUN = 4
"""Texts that are also sent through the model, from text to logits, both ways."""


def verify_tokenizer(
    companions: Companions,
    vocabulary: Vocabulary,
    directory: Path,
    artifact: Artifact,
    target: Target,
) -> int:
    """Compare text → shipped tokenizer → model with text → original tokenizer → map → model.

    Where every token of the original is kept both must agree; other texts must come out as ids the
    model has.

    Returns:
        How many texts were read alike.

    Raises:
        InternalError: for the first text that is not.
    """
    original = _tokenizer(companions.directory)
    shipped = _tokenizer(directory)
    kept = vocabulary.new_ids
    length = companions.inputs["input_ids"].shape[1]
    alike = 0
    for text in companions.texts:
        before, after = original.encode(text).ids[:length], shipped.encode(text).ids[:length]
        if any(index >= len(kept) for index in after):
            raise InternalError(f"{directory}: its tokenizer gives ids the model lacks: {text!r}")
        if not all(old in kept for old in before):
            continue
        if after != [kept[old] for old in before]:
            raise InternalError(
                f"{directory}: its tokenizer reads {text!r} otherwise than the original: "
                f"{shipped.encode(text).tokens}, not {original.encode(text).tokens}"
            )
        if alike < _RUN:
            _compare(before, after, directory, artifact, target)
        alike += 1
    return alike


def _compare(
    before: list[int], after: list[int], directory: Path, artifact: Artifact, target: Target
) -> None:
    own = Artifact(artifact.path, artifact.size_bytes, own_ids=True)
    expected = target.run(artifact, _feeds(before))
    found = target.run(own, _feeds(after))
    difference = float(np.abs(expected - found).max())
    if not difference <= 1e-5:
        raise InternalError(
            f"{directory}: with its own tokenizer the model's logits differ by {difference:.3g}"
        )


def _feeds(ids: list[int]) -> dict[str, np.ndarray]:
    row = np.array([ids], np.int64)
    return {"input_ids": row, "attention_mask": np.ones_like(row)}


def _tokenizer(directory: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(directory / TOKENIZER))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
