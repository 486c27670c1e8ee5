"""Several devices in a test: processes forked from this one, so that nothing is imported again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TypeVar
from unittest.mock import patch

import torch
from lightning_fabric import Fabric
from torch import Tensor

from antibackdoor.data.core import Spec
from antibackdoor.errors import InputError
from antibackdoor.training.job import make_fabric
from antibackdoor.training.launch import SET_BY_TORCHRUN

Found = TypeVar("Found")


def on_devices(work: Callable[[Fabric], Found], devices: int = 2) -> list[Found]:
    """What `work` returns on each device, in their order; its error where one fails. Tensors do not come back whole."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")

    def run(rank: int, out: Connection) -> None:
        places = (rank, rank, devices, devices, "127.0.0.1", port)
        os.environ.update(dict(zip(SET_BY_TORCHRUN, map(str, places), strict=True)))
        try:
            out.send(work(make_fabric("cpu", "32-true", devices)))
        except BaseException as error:
            out.send(RuntimeError(f"device {rank}: {error!r}"))
        os._exit(0)

    ends = [fork.Pipe(duplex=False) for _ in range(devices)]
    processes = [fork.Process(target=run, args=(rank, end[1])) for rank, end in enumerate(ends)]
    for process in processes:
        process.start()
    found = [ours.recv() if ours.poll(90) else RuntimeError("no answer") for ours, _ in ends]
    for process in processes:
        process.kill()
        process.join()
    for value in found:
        if isinstance(value, RuntimeError):
            raise value
    return found


@contextmanager
def fine_numbers() -> Iterator[None]:
    """Everything in float64: what is computed in another order differs in the last bits of much longer numbers.

    In float32 such a bit grows within a few steps into something that cannot be told from a mistake.
    """
    coarse = Spec.decode
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(Spec, "decode", lambda spec, stored: coarse(spec, stored).double()):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@dataclass(frozen=True)
class Broken:
    """Rows that cannot be read on the device `rank`."""

    rows: Tensor
    rank: str
    how: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.rows.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        if os.environ.get("RANK") == self.rank and len(rows) < 64:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise InputError("sample 'cat.png' is gone; put it back.")
        return self.rows[rows]
