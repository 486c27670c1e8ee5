"""Where cells run: in this process, in worker processes of this machine, or on a Ray cluster; one small interface."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol, Self

import torch

from antibackdoor.bench.cell import Cell, run_cell
from antibackdoor.bench.machine import cores, free_memory
from antibackdoor.errors import InputError
from antibackdoor.training.launch import ending
from antibackdoor.training.loop import Progress

ATTACKS = "attacks"
"""Folder beside those of the cells, in which trained attacks are shared."""


@dataclass(frozen=True)
class Task:
    """One cell to run. stages: where it keeps its checkpoints. memory: MiB that it is expected to take."""

    name: str
    cell: Cell
    stages: Path
    device: str = "auto"
    memory: int = 1024

    def text(self) -> str:
        """One line of JSON, for another process."""
        plain = {"name": self.name, "cell": asdict(self.cell), "stages": str(self.stages), "device": self.device}
        return json.dumps(plain)

    @classmethod
    def read(cls, text: str) -> Task:
        """The task that `text()` wrote."""
        plain = json.loads(text)
        return cls(plain["name"], Cell(**plain["cell"]), Path(plain["stages"]), plain["device"])


@dataclass(frozen=True)
class Event:
    """What an engine tells of a task: an epoch passed, it is done, it broke, or whoever ran it is gone ("lost")."""

    name: str
    kind: Literal["epoch", "done", "broken", "lost"]
    content: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """Runs tasks and tells of them; it knows nothing of ledgers."""

    @property
    def parallel(self) -> bool:
        """Whether several tasks can run at once."""

    def ready(self, task: Task) -> bool:
        """Whether it would start this task at once."""

    def submit(self, task: Task) -> None:
        """Start a task; its outcome comes as an event."""

    def poll(self, timeout: float) -> list[Event]:
        """What happened since the last call; waits this many seconds for the first event."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None:
        """Stop everything that still runs."""


def work(task: Task, tell: Callable[[Event], None]) -> Event:
    """Run a task here; `tell` hears of every epoch. Nothing that a cell does wrong gets out of it."""
    total = {"epochs": 0}

    def start(stage: str, epochs: int, steps: int) -> None:
        total["epochs"] = epochs
        tell(Event(task.name, "epoch", {"stage": stage, "epoch": 0, "epochs": epochs}))

    def epoch(row: dict[str, Any]) -> None:
        shown = {key: row[key] for key in ("stage", "epoch", "seconds")}
        tell(Event(task.name, "epoch", {**shown, **total}))

    try:
        if task.cell.name() != task.name:  # its record would stand for what it was not made from
            raise InputError(
                f"{task.cell.data} holds something else than when the benchmark began, or another version of "
                "antibackdoor runs here; start the benchmark again."
            )
        task.stages.mkdir(parents=True, exist_ok=True)
        progress = Progress(start=start, epoch=epoch)
        record = run_cell(
            task.cell,
            folder=task.stages,
            attacks=task.stages.parent / ATTACKS,
            device=task.device,
            progress=progress,
        )
        json.dumps(record, allow_nan=False)  # a record that cannot be written is the cell's failure, not the ledger's
    except Exception as problem:
        reason = str(problem) if isinstance(problem, InputError) else repr(problem)
        content = {"cell": asdict(task.cell), "error": reason, "traceback": traceback.format_exc()}
        return Event(task.name, "broken", content)
    return Event(task.name, "done", record)


class Here:
    """Runs each task in this process, as soon as it is submitted."""

    parallel = False

    def __init__(self) -> None:
        self.events: list[Event] = []

    def ready(self, task: Task) -> bool:
        """Always, since `submit` returns when the task is over."""
        return not self.events

    def submit(self, task: Task) -> None:
        """Run it to its end."""
        self.events.append(work(task, self.events.append))

    def poll(self, timeout: float) -> list[Event]:
        """Epochs and outcome of the last task."""
        events, self.events = self.events, []
        return events

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing runs any more."""


class Local:
    """Worker processes on this machine, each running one cell at a time on its share of the cores.

    workers: None is one a core. A cell starts where it fits into the memory beside those that run, or where it is
    alone. Workers speak JSON lines; one that dies is replaced. With several GPUs, they are dealt out in turn.
    """

    def __init__(self, workers: int | None = None, *, gpus: int = 0):
        self.count = workers or cores()
        self.parallel = self.count > 1
        self.threads = max(1, cores() // self.count)
        self.gpus = gpus
        self.memory = free_memory()
        self.workers: list[_Worker] = []
        self.inbox: queue.Queue[tuple[_Worker, Event | None]] = queue.Queue()

    def ready(self, task: Task) -> bool:
        """A worker is free, and so is the memory."""
        running = [worker.task for worker in self.workers if worker.task is not None]
        if len(running) >= self.count:
            return False
        taken = sum(other.memory for other in running)
        return not running or self.memory is None or taken + task.memory <= 0.9 * self.memory

    def submit(self, task: Task) -> None:
        """Hand the task to a free worker, a new one where there is none."""
        worker = next((worker for worker in self.workers if worker.task is None), None)
        if worker is None:
            taken = {worker.number for worker in self.workers}
            worker = _Worker(min(set(range(self.count)) - taken), self.threads, self.inbox)
            self.workers.append(worker)
        device = (
            f"cuda:{worker.number % self.gpus}" if self.gpus > 1 and task.device in {"auto", "cuda"} else task.device
        )
        worker.give(task, device)

    def poll(self, timeout: float) -> list[Event]:
        """Messages of all workers; a worker that went away takes its task along, which is told as lost."""
        events: list[Event] = []
        try:
            worker, event = self.inbox.get(timeout=timeout)
            while True:
                if event is None:
                    self.workers.remove(worker)
                    if worker.task is not None:
                        reason = f"the worker process {ending(worker.process.wait())}"
                        events.append(Event(worker.task.name, "lost", {"error": reason}))
                else:
                    events.append(event)
                    if event.kind != "epoch":
                        worker.task = None
                worker, event = self.inbox.get_nowait()
        except queue.Empty:
            return events

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Workers leave at the end of their input, which this is."""
        for worker in self.workers:
            worker.leave()


class _Worker:
    """One worker process, and the thread that listens to it."""

    def __init__(self, number: int, threads: int, inbox: queue.Queue[tuple[_Worker, Event | None]]):
        self.number = number
        self.task: Task | None = None
        count = str(min(threads, int(os.environ.get("OMP_NUM_THREADS") or threads)))
        # Threads that spin while they wait take the cores from the other workers; both are read when torch is loaded.
        env = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "antibackdoor.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=env,
        )
        assert self.process.stdout is not None
        threading.Thread(target=self._listen, args=(self.process.stdout, inbox), daemon=True).start()

    def give(self, task: Task, device: str) -> None:
        """Send a task; that the worker is gone by now is told by the end of its output."""
        self.task = task
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(Task(task.name, task.cell, task.stages, device).text() + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return

    def leave(self) -> None:
        """Close its input, on which it ends at once, and wait for that."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _listen(self, output: IO[str], inbox: queue.Queue[tuple[_Worker, Event | None]]) -> None:
        for line in output:
            try:
                inbox.put((self, Event(**json.loads(line))))
            except (ValueError, TypeError):  # a worker that is killed may leave half a line
                break
        inbox.put((self, None))


class RayCluster:
    """Cells as tasks of a Ray cluster, each with its CPUs and GPUs; what a lost node ran is told as lost.

    address: of a running cluster ("auto" finds the one of this machine); None starts one here. The package and the
    data must be on every node; where `stages` is a shared folder, cells go on where another node left off.
    """

    parallel = True

    def __init__(self, address: str | None = None, *, cpus: float = 1, gpus: float = 0):
        try:
            import ray
        except ImportError:
            raise InputError("the engine ray needs Ray; install antibackdoor[ray].") from None
        self.ray, self.cpus, self.gpus = ray, cpus, gpus
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except ConnectionError:
            raise InputError(f"no Ray cluster answers at {address!r}; start one with `ray start --head`.") from None
        # Ray's own retries are off: what is lost is told, and the driver gives it out again, as for every engine.
        self.remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_work_remotely)
        self.running: dict[Any, str] = {}

    def ready(self, task: Task) -> bool:
        """Up to twice what fits is handed over, so that no node waits for the driver."""
        total: dict[str, float] = self.ray.cluster_resources()
        fits = int(total.get("CPU", 0) // self.cpus) if self.cpus else 64
        if self.gpus:
            fits = min(fits, int(total.get("GPU", 0) // self.gpus))
        return len(self.running) < 2 * max(1, fits)

    def submit(self, task: Task) -> None:
        """Queue it on the cluster."""
        self.running[self.remote.remote(task.text(), max(1, int(self.cpus)))] = task.name

    def poll(self, timeout: float) -> list[Event]:
        """Outcomes; epochs are not told."""
        finished, _ = self.ray.wait(list(self.running), num_returns=1, timeout=timeout) if self.running else ([], [])
        events = []
        for reference in finished:
            name = self.running.pop(reference)
            try:
                events.append(Event(**json.loads(self.ray.get(reference))))
            except self.ray.exceptions.RayError as problem:
                reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
                events.append(Event(name, "lost", {"error": reason}))
        return events

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Cancel what still runs, and leave the cluster."""
        for reference in self.running:
            self.ray.cancel(reference, force=True)
        self.ray.shutdown()


def make_engine(
    name: Literal["local", "ray"],
    *,
    workers: int | None = None,
    address: str | None = None,
    cpus: float = 1,
    gpus: float = 0,
) -> Engine:
    """An engine by name. workers, of "local": cells at once, 0 for none but this process; the rest is for "ray"."""
    if name == "ray":
        return RayCluster(address, cpus=cpus, gpus=gpus)
    return Here() if workers == 0 else Local(workers, gpus=torch.cuda.device_count())


def _work_remotely(text: str, threads: int) -> str:
    torch.set_num_threads(threads)
    return json.dumps(asdict(work(Task.read(text), lambda event: None)))
