"""Language modelling: running text in chunks of `workload.sequence` tokens.

The size of a split counts chunks. Text is cut at line ends into pieces, the pieces are drawn in a
seeded order and tokenised until there are enough chunks, so a large corpus costs no more than asked
for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.models.sources import read_config
from autocomp.spec.schema import WorkloadSection
from autocomp.spec.task import DataSection, TaskSection
from autocomp.tasks.base import EncodedTask, check_sequence, cross_entropy, tiled
from autocomp.tasks.data import held_out_section, load_corpus, split_sizes
from autocomp.tasks.divergence import log_softmax
from autocomp.tasks.protocol import DRAWN, Array, Encoded, Split
from autocomp.tasks.splits import JUDGED, LEARNT, split_indices

if TYPE_CHECKING:
    import torch

_PIECE_CHARACTERS = 50_000
_PIECES_AT_ONCE = 8
_SURPLUS = 2
"""Tokenise this many times the chunks asked for, so that splits are not neighbours only."""


class LanguageModeling(EncodedTask):
    """Chunks of real tokens: `input_ids` `(N, T)`, no padding; labels are the inputs themselves."""

    name = "language-modeling"
    summary = "the next token of running text; perplexity"
    metric_name = "perplexity"
    input_names = ("input_ids",)
    dynamic_axes = {"input_ids": {0: "batch", 1: "sequence"}}  # noqa: RUF012
    keeps_logits = False

    @classmethod
    def build(
        cls, section: TaskSection, workload: WorkloadSection, model_path: Path, seed: int = 0
    ) -> LanguageModeling:
        """See `Task.build`."""
        from autocomp.models.load import load_tokenizer

        continued = section.teacher.fit == "full"
        check_sequence(workload.sequence, read_config(model_path), trained=continued)
        sizes, tokenizer = split_sizes(section.data), load_tokenizer(model_path)

        def chunked(data: DataSection, names: Sequence[Split]) -> Array:
            wanted = _SURPLUS * sum(sizes[name] for name in names)
            return chunk_corpus(
                load_corpus(data), tokenizer, workload.sequence, wanted, seed, unique=data.unique
            )

        held_out = None
        if section.data.held_out is None:
            chunks = chunked(section.data, DRAWN)
        else:
            chunks = chunked(section.data, LEARNT)
            held_out = chunked(held_out_section(section.data), JUDGED)
            judged = {row.tobytes() for row in held_out} if section.data.unique else set()
            chunks = chunks[np.array([row.tobytes() not in judged for row in chunks], dtype=bool)]
            chunks = np.concatenate([chunks, held_out])
        indices = split_indices(
            len(chunks),
            sizes,
            seed=seed,
            held_out=None if held_out is None else len(held_out),
            origin=section.data.source,
            unit=f"chunks of {workload.sequence} tokens",
        )
        splits: dict[Split, Encoded] = {
            name: Encoded({"input_ids": chunks[chosen]}, chunks[chosen])
            for name, chosen in indices.items()
        }
        splits["transfer"] = splits["distil"]
        return cls(splits, (), None, workload.batch)

    def logits(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`(B, T, V)`; no cache is kept."""
        output: torch.Tensor = model(input_ids=batch["input_ids"], use_cache=False).logits
        return output

    def per_example(self, logits: Array, labels: Array) -> Array:
        """Mean log-likelihood of each chunk's tokens after the first, nats."""
        predicted = log_softmax(logits[:, :-1])
        likelihood: Array = np.take_along_axis(predicted, labels[:, 1:, None], axis=-1)
        return np.asarray(likelihood[..., 0].mean(axis=1))

    def aggregate(self, per_example: Array) -> float:
        """exp(mean log-likelihood); every chunk has as many tokens."""
        return float(np.exp(per_example.mean()))

    def metric_value(self, value: float) -> float:
        """Perplexity."""
        return 1.0 / value if value > 0 else float("inf")

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the next token, `(B, T, V)` logits against `(B, T)` labels, nats."""
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def tokens(self, batch: Mapping[str, torch.Tensor]) -> int:
        """All tokens are real."""
        return batch["input_ids"].numel()

    def example_inputs(self, batch: int, sequence: int) -> dict[str, torch.Tensor]:
        """Calibration chunks, `(batch, sequence)`, cut or repeated along the sequence."""
        ids = self.splits["calibrate"].inputs["input_ids"]
        return {"input_ids": tiled(ids[:, np.arange(sequence) % ids.shape[1]], batch)}


def chunk_corpus(
    texts: list[str], tokenizer: Any, sequence: int, wanted: int, seed: int, *, unique: bool
) -> Array:
    """Disjoint chunks of consecutive tokens, int64 `(N, sequence)`; all there are, or `wanted`."""
    pieces = [piece for text in texts for piece in _pieces(text)]
    order = np.random.default_rng(seed).permutation(len(pieces))
    seen: set[bytes] = set()
    chunks: list[Array] = []
    for start in range(0, len(order), _PIECES_AT_ONCE):
        batch = [pieces[i] for i in order[start : start + _PIECES_AT_ONCE]]
        for row in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            ids = np.asarray(row, dtype=np.int64)
            for chunk in ids[: len(ids) // sequence * sequence].reshape(-1, sequence):
                key = chunk.tobytes()
                if not (unique and key in seen):
                    seen.add(key)
                    chunks.append(chunk)
        if len(chunks) >= wanted:
            break
    return np.stack(chunks[:wanted]) if chunks else np.empty((0, sequence), dtype=np.int64)


def _pieces(text: str) -> Iterator[str]:
    """Consecutive pieces of a text, cut after a line end once long enough."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE_CHARACTERS)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end
