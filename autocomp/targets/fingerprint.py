"""What a latency depends on apart from the model: processor, runtime, workload."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
)


def describe_cpu() -> dict[str, Any]:
    """Model name, instruction sets that matter, logical cores; the same in every process."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    return {
        "machine": platform.machine(),
        "cpu": name,
        "instructions": [flag for flag in _FLAGS if flag in flags],
        "cores": os.cpu_count(),
    }
