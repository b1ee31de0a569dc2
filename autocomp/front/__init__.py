"""What survives: dominance, hypervolume, the front, the choice under a budget and how sure it is.

No torch.
"""

from autocomp.front.choice import Choice, choose
from autocomp.front.dominance import crowding, hypervolume, non_dominated
from autocomp.front.noise import Interval, Noise
from autocomp.front.pick import NothingFitsError, front, pick, rankable
from autocomp.front.view import front_json, study_hypervolume, trial_json

__all__ = [
    "Choice",
    "Interval",
    "Noise",
    "NothingFitsError",
    "choose",
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
