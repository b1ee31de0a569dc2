"""A worker process on its own: builds the pickled tasks it is given.

Prints peak bytes, bytes of its imports, and processor seconds. The peak is the largest that
building an item reports: the kernel's high-water mark (`VmHWM`), which building counts anew for
each item, so that the mark left at the end is that of the last alone. The part of it taken by
imports is resident memory before the first task.
"""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path


def main() -> None:
    """`python -m benchmarks.build_worker TASKS`."""
    import torch

    from autocomp.library.build import build_unit

    torch.set_num_threads(1)
    tasks = pickle.loads(Path(sys.argv[1]).read_bytes())
    torch.linalg.cholesky(torch.eye(8))  # the linear algebra library is loaded at first use
    before, start = _status_bytes("VmRSS"), time.process_time()
    peak = max(item.peak_bytes for task in tasks for item in build_unit(task))
    print(peak, before, time.process_time() - start)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


if __name__ == "__main__":
    main()
