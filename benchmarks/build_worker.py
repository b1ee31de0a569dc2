"""A worker process on its own: builds the pickled tasks it is given; prints peak and import bytes.

Peak resident memory is the kernel's count for the process; the part of it taken by imports is
resident memory before the first task.
"""

from __future__ import annotations

import pickle
import resource
import sys
from pathlib import Path


def main() -> None:
    """`python -m benchmarks.build_worker TASKS`."""
    import torch

    from autocomp.library.build import build_unit

    torch.set_num_threads(1)
    tasks = pickle.loads(Path(sys.argv[1]).read_bytes())
    torch.linalg.cholesky(torch.eye(8))  # the linear algebra library is loaded at first use
    before = _resident_bytes()
    for task in tasks:
        build_unit(task)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(peak, before)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
