"""What the search asks for: a trial to run, with its id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autocomp.core.candidate import Candidate
from autocomp.core.measurement import Measurement
from autocomp.study.records import TrialKind


@dataclass(frozen=True)
class Proposal:
    """A trial to run. `id` is readable for baselines, else the first digits of the key."""

    id: str
    kind: TrialKind
    candidate: Candidate
    proposed_by: str
    estimated: Measurement | None

    def to_json(self) -> dict[str, Any]:
        """Plain mapping, the payload of a worker."""
        return {
            "id": self.id,
            "kind": self.kind,
            "candidate": self.candidate.to_json(),
            "proposed_by": self.proposed_by,
            "estimated": None if self.estimated is None else self.estimated.to_json(),
        }


def trial_id(candidate: Candidate) -> str:
    """The id of a proposal of the search."""
    return candidate.key[:10]
