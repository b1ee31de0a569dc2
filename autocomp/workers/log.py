"""What happens in a worker is kept where the controller keeps its own log."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from autocomp.study.log import LogFile

VARIABLE = "AUTOCOMP_LOG"
HOOK = f"{__name__}.keep_log"
"""What Ray calls in each worker process before its first work."""


def keep_log() -> None:
    """Append what this process logs to the file that `VARIABLE` names."""
    path = os.environ.get(VARIABLE)
    root = logging.getLogger("autocomp")
    if path and not any(isinstance(handler, LogFile) for handler in root.handlers):
        root.addHandler(LogFile(Path(path)))
        root.setLevel(logging.INFO)
