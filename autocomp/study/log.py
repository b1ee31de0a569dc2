"""The study's log file, which every process of a search appends to."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s [%(process)d]: %(message)s"


class LogFile(logging.Handler):
    """Appends each message, with its traceback, by a single write: those of several processes do
    not mix. A file that cannot be written is left alone; logging fails no work.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self.path = Path(path)
        self.setFormatter(logging.Formatter(FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            line = f"{self.format(record)}\n".encode(errors="replace")
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError:
            return
        except Exception:
            self.handleError(record)


@contextmanager
def logging_to(*handlers: logging.Handler) -> Iterator[None]:
    """Everything autocomp logs from INFO on goes to these handlers too."""
    root = logging.getLogger("autocomp")
    level = root.level
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
