"""How fast poison is made: samples a second of every attack, the time to fit, and static triggers against a loop.

Every attack poisons the same random images of CIFAR-10's size, or series of 140 steps; what is timed is `Attack.make`,
from stored samples to stored samples, in batches as `poison` uses it. The loop does the same sample by sample. Attacks
that train are fitted by their default recipes, whose floor of steps makes the time all but independent of how few
samples there are; --quick does one epoch a stage, and tells of the machinery only.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import Any

import torch
from lightning_fabric import Fabric

from antibackdoor.attacks import ATTACKS, Fitted
from antibackdoor.bench.poisoned import fitted
from antibackdoor.training.loop import Recipe
from benchmarks.turns import random_images, random_series, ratio, take_turns, timed

LOOPED = 200
"""Samples of the loop: its time a sample does not depend on how many there are."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=2560, help="of the attacks that need no training")
    parser.add_argument("--trained-samples", type=int, default=500, help="of the attacks that train")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--surrogate", default="resnet18-w8", help="network of the attacks that train")
    parser.add_argument("--quick", action="store_true", help="train attacks for one epoch a stage")
    parser.add_argument("--only", nargs="*", default=[], help="names of attacks; none: all")


def measure(args: argparse.Namespace, fabric: Fabric) -> dict[str, Any]:
    chosen = [entry for entry in ATTACKS if not args.only or entry.name in args.only]
    records = [one_attack(entry.name, kind, args, fabric) for entry in chosen for kind in entry.kinds]
    return {
        "ratios": {
            f"loop over batches, {record['attack']}, {record['kind']}": record.pop("ratio")
            for record in records
            if "ratio" in record
        },
        "attacks": records,
    }


def quick(attack: Any) -> Any:
    """A trained attack with short training."""
    recipes = {
        field.name: dataclasses.replace(getattr(attack, field.name), epochs=1, min_steps=0)
        for field in dataclasses.fields(attack)
        if isinstance(getattr(attack, field.name), Recipe)
    }
    return dataclasses.replace(attack, **recipes)


def one_attack(name: str, kind: str, args: argparse.Namespace, fabric: Fabric) -> dict[str, Any]:
    entry = ATTACKS[name]
    trained = issubclass(entry.make, Fitted)
    n = args.trained_samples if trained else args.samples
    data = random_images(n) if kind == "image" else random_series(n)
    attack = quick(entry.make()) if trained and args.quick else entry.make()
    state: dict[str, torch.Tensor] = {}

    def fit() -> None:
        state.update(fitted(attack, data, seed=0, victim=args.surrogate, fabric=fabric))

    record: dict[str, Any] = {"attack": name, "kind": kind, "trained": trained, "samples": n}
    record |= {"quick": True} if trained and args.quick else {}
    record["fit_seconds"] = round(timed(fit, fabric.device), 3)
    candidates = attack.candidates(data.y, attack.leads_to(data.y, torch.arange(n), 10), "poison")
    rows = candidates.nonzero().flatten().repeat(10)[:n]
    few = rows[:LOOPED]
    parts = {"batched": lambda: [attack.make(data, part, state, "poison") for part in rows.split(args.batch)]}
    if not trained:
        parts["looped"] = lambda: [attack.make(data, row[None], state, "poison") for row in few]
    seconds = take_turns(parts, args.repeats, fabric.device)
    record["samples_per_second"] = round(len(rows) / statistics.median(seconds["batched"]))
    if not trained:
        record["ratio"] = ratio(seconds["looped"], seconds["batched"], scale=len(rows) / len(few))
    return record
