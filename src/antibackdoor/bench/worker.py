"""A worker process: a task a line on its input, an event a line on its output; it ends with its input."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from dataclasses import asdict

from antibackdoor.bench.engines import Event, Task, work


def main() -> None:
    """Run tasks until the input ends; then leave at once, in the middle of a task too, which its checkpoints survive.

    So a driver that is killed leaves no worker behind that goes on by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with events
    tasks: queue.Queue[Task] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            tasks.put(Task.read(line))
        os._exit(0)

    def tell(event: Event) -> None:
        events.write(json.dumps(asdict(event), allow_nan=False) + "\n")

    threading.Thread(target=listen, daemon=True).start()
    while True:
        tell(work(tasks.get(), tell))


if __name__ == "__main__":
    main()
