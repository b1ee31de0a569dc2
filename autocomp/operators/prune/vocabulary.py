"""Vocabulary: keep the rows of the tokens a task uses; the tokenizer is rewritten to match.

Kept are the tokens of at least two examples of the calibrate and distil splits, special tokens, and
the characters any other text can be spelt with. Positions and hidden sizes are untouched. Training
and stitching go on in original ids; a model that is shipped takes the ids of the tokenizer shipped
with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from autocomp.core.candidate import Step
from autocomp.core.errors import InternalError, UserError
from autocomp.core.unit import SiteFormat, Unit, resized
from autocomp.operators.protocol import Need, Rule, Stage, UnitState, UnitStats


class PruneVocabulary:
    """Keep `keep` rows of the word embedding; other tokens read the row of token `unknown`."""

    name = "vocabulary"
    summary = "Keep the word embeddings of the tokens a task uses; ship a tokenizer of those."
    paper = "Abdaoui et al., 2020, Load What You Need, arXiv:2010.05609"
    choices = "structure.vocabulary: true"
    stage: Stage = "structure"
    version = 1
    speeds_up: tuple[str, ...] = ()
    shrinks: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    saves_memory: tuple[str, ...] = ()

    def options(self, unit: Unit, rule: Rule) -> Sequence[Step | None]:
        """The whole vocabulary or the task's; the rule then says `{"keep": N, "unknown": id}`.

        Raises:
            UserError: where there is no word embedding.
        """
        choice = rule.structure.get("vocabulary")
        if not choice:
            return []
        site = unit.site("embedding")
        if site is None:
            raise UserError(
                f"vocabulary at {unit.name}: a unit of kind {unit.kind} has no vocabulary. Match "
                f"embeddings only"
            )
        if not isinstance(choice, Mapping):
            raise InternalError("the rule does not say how many tokens the task uses")
        if choice["keep"] >= site.rows:
            return [None]
        return [None, Step.of("vocabulary", keep=choice["keep"], unknown=choice["unknown"])]

    def formats(
        self, unit: Unit, formats: Mapping[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        """The word embedding loses rows."""
        site = unit.site("embedding")
        assert site is not None
        return {**formats, site.name: resized(formats[site.name], rows=step["keep"])}

    def needs(self, step: Step) -> frozenset[Need]:
        """Which tokens occur."""
        return frozenset({"rows"})

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Cut the rows; the rows to keep are those `stats` count at all.

        Raises:
            InternalError: if these are not as many as the step says.
        """
        import torch

        site = unit.site("embedding")
        assert site is not None
        here, seen = state[site.name], stats[site.name].rows if site.name in stats else None
        kept = torch.empty(0, dtype=torch.int64) if seen is None else seen.nonzero().flatten()
        if len(kept) != step["keep"] or step["unknown"] not in kept:
            raise InternalError(
                f"vocabulary at {unit.name}: statistics name {len(kept)} tokens, not the "
                f"{step['keep']} asked for. Start the same command again"
            )
        unknown = int((kept == step["unknown"]).nonzero())
        row_of = torch.full((site.rows,), unknown, dtype=torch.int64)
        row_of[kept] = torch.arange(len(kept))
        pruned = replace(
            here,
            weight=here.weight[kept],
            format=resized(here.format, rows=len(kept)),
            kept_rows=kept,
            row_of=row_of,
        )
        return {**state, site.name: pruned}


OPERATOR = PruneVocabulary()
