"""The processes of a run on several devices: started here on one machine, by torchrun on several."""

from __future__ import annotations

import _thread
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from antibackdoor.errors import InputError

Program = tuple[Callable[..., object], Mapping[str, Any]]
"""A function and its arguments, which every process calls; they are sent to the processes."""

SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NOTICE, PATIENCE = 3.0, 30.0
"""Seconds until a process that waits for one that has failed is interrupted, and until it is ended."""
SHARED_MEMORY = Path("/dev/shm")


def check_devices(device: str, devices: int, nodes: int) -> None:
    """InputError for a number of devices that is not there, or that this program was not started with."""
    if devices < 1 or nodes < 1:
        raise InputError(f"devices and nodes must be at least 1, got {devices} and {nodes}.")
    if devices * nodes == 1:
        return
    if not torch.distributed.is_available():
        raise InputError("this build of PyTorch cannot use several devices; use --devices 1.")
    if ":" in device or device == "mps":
        raise InputError(f"several devices cannot all be {device!r}; use --device cuda, cpu or auto.")
    there = torch.cuda.device_count()
    if device != "cpu" and 0 < there < devices:
        raise InputError(f"{devices} devices were asked for, but this machine has {there}; use --devices {there}.")
    if launched():
        world = int(os.environ["WORLD_SIZE"])
        if world != devices * nodes:
            raise InputError(f"torchrun started {world} processes, but --devices x --nodes is {devices * nodes}.")
    elif nodes > 1:
        raise InputError(
            f"runs on several nodes are started by torchrun, on each of them: torchrun --nnodes {nodes} "
            f"--nproc-per-node {devices} --rdzv-backend c10d --rdzv-endpoint HOST:PORT --no-python antibackdoor ..."
        )


def launched() -> bool:
    """Whether this process is one of several that were started together."""
    return all(name in os.environ for name in SET_BY_TORCHRUN)


def first(world: int) -> bool:
    """Whether this process is the one of `world` that writes and talks."""
    return world == 1 or not launched() or os.environ["RANK"] == "0"


def ending(status: int) -> str:
    """How a process ended, in words that follow its name; a signal, of the system too that lacks memory, is below 0."""
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


@contextmanager
def processes(devices: int, nodes: int, program: Program, size: int = 0) -> Iterator[None]:
    """For the length of the block, this process is the first of `devices` x `nodes`; the others run `program`.

    On one machine they are started here, with torchrun's variables in their environment and in this one's, and end with
    this process, however it ends. Tensors among the arguments, of `size` bytes, are in memory once for all of them.
    Where one of them fails, the block ends with an InputError that says why.
    """
    if devices * nodes == 1:
        yield
        return
    if launched():
        yield
        _disconnect()
        return
    _check_room(size)
    others = _Others(devices, program)
    threads, before = torch.get_num_threads(), {name: os.environ.get(name) for name in SET_BY_TORCHRUN}
    os.environ.update(_place(0, devices, others.port))
    torch.set_num_threads(max(1, threads // devices))
    try:
        yield
        others.join()
    except BaseException as error:
        # A failure elsewhere shows here as a broken connection, or as the interruption that `_Others` sends.
        others.noticed.set()
        failure = None if isinstance(error, InputError) else others.failure(isinstance(error, KeyboardInterrupt))
        if failure is not None:
            raise InputError(failure) from None
        raise
    finally:
        others.end()
        _disconnect()
        torch.set_num_threads(threads)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _check_room(size: int) -> None:
    """Without room there, a write to shared memory would kill the program; containers have 64 MB by default."""
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free < size:
        raise InputError(
            f"the samples ({size / 2**20:.0f} MiB) do not fit the shared memory in {SHARED_MEMORY}, through which "
            "devices share them; make it larger (docker: --shm-size), or use --memory-map."
        )


def _place(rank: int, devices: int, port: int) -> dict[str, str]:
    values = (rank, rank, devices, devices, "127.0.0.1", port)
    return dict(zip(SET_BY_TORCHRUN, map(str, values), strict=True))


def _disconnect() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class _Others:
    """The processes of rank 1, 2, ... on this machine, and a thread that sees them fail."""

    def __init__(self, devices: int, program: Program):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.processes: list[BaseProcess] = []
        self.reasons: list[Connection] = []
        self.failed, self.noticed, self.ended = threading.Event(), threading.Event(), threading.Event()
        threads = max(1, torch.get_num_threads() // devices)
        try:
            for rank in range(1, devices):
                self._start(_place(rank, devices, self.port), threads, program)
            for rank, reason in enumerate(self.reasons, 1):
                if _said(reason, None) is None:
                    raise InputError(
                        f"the process of device {rank} could not begin; a program that trains on several devices must "
                        "do so under `if __name__ == '__main__':`."
                    )
        except BaseException:
            self.end()
            raise
        main = threading.current_thread() is threading.main_thread()
        threading.Thread(target=self._watch, args=(main,), daemon=True).start()

    def _start(self, environment: dict[str, str], threads: int, program: Program) -> None:
        spawn = multiprocessing.get_context("spawn")  # forks of a process that uses CUDA or has threads are broken
        ours, theirs = spawn.Pipe(duplex=False)
        process = spawn.Process(target=_other, args=(environment, threads, theirs, program), daemon=True)
        try:
            process.start()
        except Exception as error:  # whatever a foreign class raises when it is asked for its state
            raise InputError(
                f"the data, or a model of your own, cannot be sent to other processes ({error}); define classes in a "
                "module of their own, or use one device."
            ) from None
        theirs.close()
        self.processes.append(process)
        self.reasons.append(ours)

    def _watch(self, main: bool) -> None:
        """When a process has failed, interrupt the main thread; where that does not reach it, end the program."""
        left = {process.sentinel: process for process in self.processes}
        while left and not self.ended.is_set():
            done = [left.pop(sentinel) for sentinel in wait(list(left), timeout=0.2) if isinstance(sentinel, int)]
            for process in done:
                process.join()  # what it held is closed a moment before it has a status
            if any(process.exitcode for process in done):
                self.failed.set()
                if main and not self.noticed.wait(NOTICE) and not self.ended.is_set():
                    _thread.interrupt_main()
                if not self.ended.wait(PATIENCE):  # the main thread waits for its device, which waits for the others
                    print(f"error: {self.reason()}", file=sys.stderr, flush=True)
                    os._exit(2)
                return

    def failure(self, interrupted: bool) -> str | None:
        """Why another process failed; None where none did. After an interruption, only what is known already."""
        return self.reason() if self.failed.wait(0.0 if interrupted else 5.0) else None

    def reason(self) -> str:
        """What the first process that failed by itself said, else how it ended."""
        told = [said for said in map(_said, self.reasons) if said is not None]
        if told:
            return str(min(told)[1])
        codes = {rank: process.exitcode for rank, process in enumerate(self.processes, 1) if process.exitcode}
        rank, code = next(iter(codes.items()))
        return f"the process of device {rank} {ending(code)}; go on with --resume."

    def join(self) -> None:
        """Wait for all to end by themselves."""
        for process in self.processes:
            process.join(PATIENCE)

    def end(self) -> None:
        """End what is left of them."""
        self.ended.set()
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()


def _said(reason: Connection, patience: float | None = 0.5) -> Any:
    """What a process has sent; None where it said nothing, which is known at once where it has ended."""
    try:
        return reason.recv() if reason.poll(patience) else None
    except (EOFError, OSError):
        return None


def _other(environment: dict[str, str], threads: int, reason: Connection, program: Program) -> None:
    """What another process does: the same program, silently; an error is told to the first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is interrupted, and ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    run, arguments = program
    reason.send("begun")
    try:
        run(**arguments)
    except BaseException as error:
        # (1, ...): most likely the connection to one that failed before it.
        wanted = isinstance(error, InputError)
        text = str(error) if wanted else f"device {environment['RANK']}: {type(error).__name__}: {error}".split("\n")[0]
        reason.send((0 if wanted else 1, text))
        os._exit(2)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
