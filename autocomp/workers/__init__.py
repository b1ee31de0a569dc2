"""Workers: Ray, embedded or a cluster, behind four calls. The only room that imports ray.

    with start(workers=2) as cluster:
        run_tasks(build, items, cluster.workers, progress)         # stateless work, in order
        with ActorPool(Screener, (model,), cluster.workers) as pool:
            for index, kl in pool.map_unordered("evaluate", candidates): ...
        run_trials(proposer, RunnerFactory(Runner, args), ...)     # full trials, through Ray Tune

Importing this package does not import ray; the first call does. `run_trials` is imported from
`autocomp.workers.trials`, which imports Ray Tune at once (2–3 s).
"""

from autocomp.workers.actors import ActorPool
from autocomp.workers.cluster import Cluster, start
from autocomp.workers.protocol import Proposer, RunnerFactory, TrialRunner
from autocomp.workers.tasks import run_tasks

__all__ = [
    "ActorPool",
    "Cluster",
    "Proposer",
    "RunnerFactory",
    "TrialRunner",
    "run_tasks",
    "start",
]
