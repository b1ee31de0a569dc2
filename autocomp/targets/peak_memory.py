"""Child process: load an artifact, run it once, print the peak resident memory in bytes.

`python -m autocomp.targets.peak_memory MODULE MODEL INPUTS.npz THREADS GENERATE`. MODULE has the
target's `open_session`. With GENERATE above zero the inputs are prompts, and so many tokens are
generated after them. Imports the runtime and numpy alone: the figure is that of a deployment.
"""

from __future__ import annotations

import importlib
import resource
import sys
from pathlib import Path

import numpy as np

from autocomp.targets.generation import generate


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> bool:
    """Let `peak_bytes` count from now on; whether the system can. Linux alone can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def main(module: str, model: str, inputs: str, threads: str, tokens: str) -> None:
    """Run and print."""
    session = importlib.import_module(module).open_session(Path(model), int(threads))
    with np.load(inputs, allow_pickle=False) as arrays:
        feed = {name: arrays[name] for name in arrays.files}
        if int(tokens):
            generate(session, feed, int(tokens))
        else:
            session.run(None, feed)
    sys.stdout.write(f"{peak_bytes()}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
