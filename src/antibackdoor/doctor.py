"""What `doctor` tells: versions, devices, threads, data and extras of this machine, and what is wrong with them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.markup import escape
from rich.table import Table

from antibackdoor.data.catalog import CATALOG
from antibackdoor.data.core import Spec
from antibackdoor.environment import version_of
from antibackdoor.limits import memory
from antibackdoor.models import create
from antibackdoor.training.job import make_fabric

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = ("antibackdoor", "torch", "torchvision", "lightning-fabric", "numpy", "pandas", "scikit-learn", "plotly")
ROOT = "ANTIBACKDOOR_DATA"


def examine(data_root: Path | None = None) -> dict[str, Any]:
    """Everything that is known of this machine, as plain JSON values; `problems` holds a sentence for each fault."""
    root = data_root or (Path(os.environ[ROOT]) if os.environ.get(ROOT) else None)
    found: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        "devices": _devices(),
        "data": {
            "root": None if root is None else str(root),
            "embedded": [entry.name for entry in CATALOG.values() if entry.embedded],
            "in root": [e.name for e in CATALOG.values() if root is not None and (root / f"{e.name}.npz").is_file()],
        },
        "extras": _extras(),
    }
    found["problems"] = list(_problems(found, root))
    return found


def print_examination(console: Console, found: dict[str, Any]) -> None:
    """Tables for people."""
    for title in ("versions", "devices", "data", "extras"):
        table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
        for key, value in found[title].items():
            table.add_row(escape(str(key)), escape(_words(value)))
        console.print(table)
        console.print()
    for sentence in found["problems"]:
        console.print(f"[bold red]problem[/] {escape(sentence)}", soft_wrap=True)
    if not found["problems"]:
        console.print("[bold green]No problem was found.[/] Try: antibackdoor demo")


def _devices() -> dict[str, Any]:
    """What can be trained on, and how fast a small network goes on what `--device auto` takes."""
    fabric = make_fabric()
    there = memory()
    told: dict[str, Any] = {
        "auto takes": f"{fabric.device.type}, precision {fabric._precision.precision}",
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "memory": None if there is None else f"{there / 2**30:.1f} GiB",
        "free disk here": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB",
    }
    if torch.version.cuda and not torch.cuda.is_available():
        told["cuda"] = "none seen, though this torch is built for it; if there is a GPU, see what nvidia-smi says"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        told[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    if torch.backends.mps.is_available():
        told["mps"] = "available"
    told["a training step"] = f"{1000 * _step_seconds(fabric):.0f} ms (resnet18-w8, 64 images of 32 x 32)"
    return told


def _step_seconds(fabric: Any) -> float:
    """The quicker of two training steps of a small network; the first one also warms up."""
    model = fabric.to_device(create("resnet18-w8", Spec("image", (3, 32, 32), ("a", "b"))))
    x = torch.rand(64, 3, 32, 32, device=fabric.device)
    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        with fabric.autocast():
            loss = model(x).float().logsumexp(1).mean()
        loss.backward()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def _extras() -> dict[str, str]:
    """For each extra of this package: installed, or what to install."""
    try:
        listed = requires("antibackdoor") or []
    except PackageNotFoundError:
        return {}
    needed: dict[str, list[str]] = {}
    for line in listed:
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if extra and name and name.group() != "antibackdoor":
            needed.setdefault(extra.group(1), []).append(name.group())
    missing = {extra: [name for name in names if version_of(name) is None] for extra, names in needed.items()}
    return {
        extra: f"missing {', '.join(names)}: pip install 'antibackdoor[{extra}]'" if names else "installed"
        for extra, names in missing.items()
    }


def _problems(found: dict[str, Any], root: Path | None) -> Any:
    if root is not None and not root.is_dir():
        yield f"{root} (from ${ROOT} or --data-root) is no folder; named data sets are looked for there first."
    if torch.get_num_threads() > (os.cpu_count() or 1):
        yield f"{torch.get_num_threads()} threads on {os.cpu_count()} cores wait for each other; lower OMP_NUM_THREADS."
    if shutil.disk_usage(Path.cwd()).free < 2**30:
        yield "less than 1 GiB of disk is free here; checkpoints of a run may not fit."
    for name, number in found["versions"].items():
        if number is None and name != "antibackdoor":
            yield f"{name} is not installed as a package; reinstall antibackdoor."


def _words(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
