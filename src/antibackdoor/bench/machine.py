"""What this machine has: cores and memory that this process may use, and how much of it a cell took."""

from __future__ import annotations

import os
from pathlib import Path

MIB = 2**20


def cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _text("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        count = min(count, max(1, int(quota) // int(period)))
    return count


def free_memory() -> int | None:
    """MiB that can be taken now, by the kernel and by the limit of the control group; None where that is unknown."""
    rows = dict(line.split(":", 1) for line in _text("/proc/meminfo").splitlines() if ":" in line)
    if "MemAvailable" not in rows:
        return None
    free = int(rows["MemAvailable"].split()[0]) * 1024
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        free = min(free, int(limit) - int(used))
    return free // MIB


def reset_peak_memory() -> None:
    """Start anew to watch for the largest memory of this process, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_memory() -> int | None:
    """The largest resident memory of this process since the reset in MiB; None where the system does not tell."""
    for line in _text("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 // MIB
    return None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""
