"""What the phases of one call of `search` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocomp.api.phases import PhaseTimes
from autocomp.api.plan import Plan
from autocomp.api.predictor import TablePredictor
from autocomp.core.budget import Budget
from autocomp.core.candidate import Runtime
from autocomp.study.directory import Study

if TYPE_CHECKING:
    from autocomp.trial.context import TrialContext
    from autocomp.workers.cluster import Cluster


@dataclass(frozen=True)
class Session:
    """A search under way.

    Attributes:
        cluster: starts the workers at first use and keeps them until the search ends.
        deadline: no trial is proposed after it, in `time.monotonic()` seconds.
    """

    plan: Plan
    study: Study
    progress: PhaseTimes
    cluster: Callable[[], Cluster]
    deadline: float | None


@dataclass(frozen=True)
class Measured:
    """What is known once the dense model and the target are measured.

    Attributes:
        context: what workers need; its references name the runtimes that can be used.
        budget: absolute limits.
        tables: the cost table of each runtime on which the budget is within reach.
    """

    context: TrialContext
    budget: Budget
    tables: Mapping[Runtime, TablePredictor]
