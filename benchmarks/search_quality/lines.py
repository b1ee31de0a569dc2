"""Lines that say how far a benchmark is."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY_S = 20.0


def progress(what: str) -> Callable[[int, int], None]:
    """A callback for `ActorPool.map` that prints a line every so often, and at the end."""
    began = last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY_S or done == total:
            last = now
            print(f"  {done}/{total} {what}, {now - began:.0f} s", flush=True)

    return tell
