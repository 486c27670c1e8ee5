"""How fast poison is made: samples a second of every attack, the time to fit, and static triggers against a loop.

    python benchmarks/poisoning.py --out results/cost

Every attack poisons the same random images of CIFAR-10's size, or series of 140 steps; what is timed is `Attack.make`,
from stored samples to stored samples, in batches as `poison` uses it. The loop does the same sample by sample. Batched
and looped take turns, so that a noisy machine hits both alike; the figures are medians. Beside the time on the clock
stands the processor time of the process, which other programs do not stretch; the ratio is of processor times.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from antibackdoor.attacks import ATTACKS, Fitted
from antibackdoor.bench.poisoned import fitted
from antibackdoor.data.core import Data, Spec
from antibackdoor.environment import environment
from antibackdoor.files import write_json
from antibackdoor.training.job import make_fabric
from antibackdoor.training.loop import Recipe

LOOPED = 200
"""Samples of the loop: its time a sample does not depend on how many there are."""


def sample_data(kind: str, n: int) -> Data:
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 10
    classes, ids = tuple("0123456789"), [str(row) for row in range(n)]
    if kind == "image":
        x = torch.randint(256, (n, 3, 32, 32), generator=rng, dtype=torch.uint8)
        return Data(x, y, Spec("image", (3, 32, 32), classes), ids)
    x = torch.randn(n, 1, 140, generator=rng)
    return Data(x, y, Spec("series", (1, 140), classes, float(x.min()), float(x.max())), ids)


def seconds(work: Any) -> tuple[float, float]:
    """On the clock, and of the processor."""
    start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def quick(attack: Any) -> Any:
    """A trained attack with short training: the benchmark times its machinery, not its success."""
    recipes = {
        field.name: dataclasses.replace(getattr(attack, field.name), epochs=1, min_steps=0)
        for field in dataclasses.fields(attack)
        if isinstance(getattr(attack, field.name), Recipe)
    }
    return dataclasses.replace(attack, **recipes)


def measure(name: str, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    entry = ATTACKS[name]
    trained = issubclass(entry.make, Fitted)
    n = args.trained_samples if trained else args.samples
    data = sample_data(kind, n)
    attack = quick(entry.make()) if trained else entry.make()
    fabric = make_fabric(args.device)
    state: dict[str, torch.Tensor] = {}

    def fit() -> None:
        state.update(fitted(attack, data, seed=0, victim=args.model, fabric=fabric))

    record: dict[str, Any] = {"attack": name, "kind": kind, "trained": trained, "samples": n}
    clock, cpu = seconds(fit)
    record |= {"fit_seconds": round(clock, 3), "fit_cpu_seconds": round(cpu, 3)}
    candidates = attack.candidates(data.y, attack.leads_to(data.y, torch.arange(n), 10), "poison")
    rows = candidates.nonzero().flatten().repeat(10)[:n]
    chunks = rows.split(args.batch)
    few = rows[:LOOPED]
    batched, looped = [], []
    for repeat in range(args.repeats + 1):
        spent = seconds(lambda: [attack.make(data, part, state, "poison") for part in chunks])
        alone = (
            (0.0, 0.0) if trained else seconds(lambda: [attack.make(data, row[None], state, "poison") for row in few])
        )
        if repeat:  # the first round pays for allocation
            batched.append(spent)
            looped.append(alone)
    clock, cpu = (statistics.median(times) / len(rows) for times in zip(*batched, strict=True))
    record["samples_per_second"] = round(1 / clock)
    record["samples_per_cpu_second"] = round(1 / cpu)
    record["cpu_seconds_for_10000"] = round(10_000 * cpu, 4)
    if not trained:
        record["ratio_loop_to_batched"] = round(statistics.median(t for _, t in looped) / len(few) / cpu, 1)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000, help="of the attacks that need no training")
    parser.add_argument("--trained-samples", type=int, default=1_000, help="of the attacks that train")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="resnet18-w8", help="surrogate of the attacks that train")
    parser.add_argument("--only", nargs="*", default=[], help="names of attacks; none: all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    records = []
    for entry in ATTACKS:
        for kind in entry.kinds:
            if not args.only or entry.name in args.only:
                records.append(measure(entry.name, kind, args))
                print(records[-1], flush=True)
    record = {
        "command": f"python benchmarks/poisoning.py --samples {args.samples} --trained-samples {args.trained_samples}",
        "threads": torch.get_num_threads(),
        "note": "trained attacks are fitted for one epoch a stage; their time to fit tells of the machinery only",
        "attacks": records,
        "environment": environment(make_fabric(args.device)),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "poisoning.json", record)


if __name__ == "__main__":
    main()
