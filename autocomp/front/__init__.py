"""What survives: dominance, hypervolume, the front and the choice under a budget. No torch."""

from autocomp.front.dominance import crowding, hypervolume, non_dominated
from autocomp.front.pick import NothingFitsError, front, pick, rankable
from autocomp.front.view import front_json, study_hypervolume, trial_json

__all__ = [
    "NothingFitsError",
    "crowding",
    "front",
    "front_json",
    "hypervolume",
    "non_dominated",
    "pick",
    "rankable",
    "study_hypervolume",
    "trial_json",
]
