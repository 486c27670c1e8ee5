"""What a result was made with: versions, device, commit; no names of machines or people."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric


def environment(fabric: Fabric) -> dict[str, Any]:
    """Versions, device class, precision and, in a checkout, the git commit (with "+" when there are changes)."""
    device = fabric.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "antibackdoor": version_of("antibackdoor"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version_of("numpy"),
        "device": f"{device.type} ({name}, {torch.backends.cpu.get_cpu_capability()})",
        "precision": str(fabric._precision.precision),
        "commit": _commit(),
    }


def version_of(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, check=False, capture_output=True, text=True, timeout=5
        )
        changed = subprocess.run(
            ["git", "diff", "--quiet", "HEAD", "--", "."], cwd=here, check=False, capture_output=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+" if changed.returncode else "")
