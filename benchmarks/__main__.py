"""python -m benchmarks [CASE ...] [--out results/cost] [--device auto] [--repeats 3] [OPTION VALUE ...]

Without a case all run. Each writes `CASE.json` (`CASE-MODEL.json` where it has a model, with the kind of device at the
end where that is not a CPU) and prints its ratios: median, smallest and largest of all rounds.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import torch

from antibackdoor.environment import environment
from antibackdoor.files import write_json
from antibackdoor.training.job import make_fabric

CASES = {
    "plain": "our loop against a minimal one of PyTorch's own calls, the limit",
    "compile": "whether compiling the network pays",
    "e2abl": "E2ABL against plain training of the same backbone",
    "jury": "the default defense, and `scan`, against plain training of the same backbone",
    "defenses": "whole runs of defenses against plain training",
    "scoring": "one batched pass over the samples against one at a time",
    "data_path": "what gathering, augmenting, poisoning and recording cost beside a training step",
    "habits": "the habits of other code against ours: same model, same steps",
    "growth": "time and peak memory by the number of samples",
    "billion": "on paper and in simulation: 10^9 samples on 1,000 workers",
    "start": "start-up time, import time, and what resuming costs",
    "fixmatch": "how much of a FixMatch step is model, and against a PIL pipeline",
    "poisoning": "samples a second of every attack, against a loop over samples",
    "grid": "what `bench` costs around the training, and what a second process gains",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="; ".join(f"{k}: {v}" for k, v in CASES.items()))
    args, rest = parser.parse_known_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"unknown case {sorted(unknown)[0]!r}; known: {', '.join(CASES)}.")
    for name in args.cases or CASES:
        run(name, rest)


def run(name: str, words: list[str]) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=module.__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/cost"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    module.add_options(parser)
    args = parser.parse_args(words)
    fabric = make_fabric(args.device)
    record: dict[str, Any] = {
        "case": name,
        "what": CASES[name],
        "command": " ".join(["python -m benchmarks", name, *words]),
        **module.measure(args, fabric),
        "threads": torch.get_num_threads(),
        "environment": environment(fabric),
    }
    parts = [name, *([args.model] if "model" in args else []), *([fabric.device.type] * (fabric.device.type != "cpu"))]
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"{'-'.join(parts)}.json", record)
    print(f"{name}: {CASES[name]}")
    for title, found in record["ratios"].items():
        goal = next((f"  ({words} {found[words]:g})" for words in ("at least", "at most") if words in found), "")
        print(f"  {title:<60} {found['median']:>8g}  [{found['low']:g}, {found['high']:g}]{goal}", flush=True)


if __name__ == "__main__":
    main()
