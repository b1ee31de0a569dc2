"""Peak resident memory of a process of its own that loads an artifact and runs it once.

It is `python -m autocomp.targets.peak_memory MODULE MODEL INPUTS.npz THREADS GENERATE`. MODULE has
the target's `open_session`. With GENERATE above zero the inputs are prompts, and so many tokens are
generated after them. Imports the runtime and numpy alone: the figure is that of a deployment.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autocomp.core.errors import InternalError, MachineError
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


def peak_bytes_alone(
    module: str, model: Path, feed: Mapping[str, npt.NDArray[Any]], *, threads: int, tokens: int
) -> int:
    """Of a new process that loads the model and runs it once, the prompt and tokens after it.

    Args:
        module: has the target's `open_session`.
        tokens: generated after the inputs, which are a prompt then; 0 for none.

    Raises:
        MachineError: if that process is killed.
        InternalError: if it fails, with the end of what it said.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    with tempfile.TemporaryDirectory() as scratch:
        arrays = Path(scratch) / "inputs.npz"
        np.savez(arrays, **feed)  # type: ignore[arg-type]
        done = subprocess.run(
            [sys.executable, "-m", __name__, module, str(model), str(arrays), str(threads),
             str(tokens)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
    if done.returncode == -signal.SIGKILL:
        raise MachineError(
            "measuring peak memory failed: its process was killed, most often because memory "
            "ran out"
        )
    if done.returncode != 0:
        raise InternalError(f"measuring peak memory failed: {done.stderr.strip()[-400:]}")
    return int(done.stdout)


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
