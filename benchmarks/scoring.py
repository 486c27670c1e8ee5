"""What scoring costs: one batched pass against one sample at a time, and the class-wise detectors on 50,000 x 512.

    python benchmarks/detectors.py --out results/cost

The images are random and the features drawn from normal distributions: cost does not depend on what they show.
Scanning sample by sample is measured on a subset, as samples a second; the two take turns, so that a noisy machine hits
both alike. No augmentation, no gradient, the same network in both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from antibackdoor.data.core import Data, Spec
from antibackdoor.detectors import make_detector
from antibackdoor.detectors.base import split_classes
from antibackdoor.environment import environment
from antibackdoor.files import write_json
from antibackdoor.models import create
from antibackdoor.training.job import make_fabric
from antibackdoor.training.scores import features_of, logits_of, losses

CLASSES, WIDTH = 10, 512


def seconds_of(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def images(n: int) -> Data:
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(256, (n, 3, 32, 32), generator=rng, dtype=torch.uint8)
    y = torch.randint(CLASSES, (n,), generator=rng)
    return Data(x, y, Spec("image", (3, 32, 32), tuple("0123456789")), [str(i) for i in range(n)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18-w16")
    parser.add_argument("--samples", type=int, default=50_000, help="that the time of one pass is worked out for")
    parser.add_argument("--batched", type=int, default=2048, help="samples that are really scored in batches")
    parser.add_argument("--single", type=int, default=128, help="samples that are really scored one at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    fabric, data = make_fabric(args.device), images(args.batched)
    torch.manual_seed(0)
    net = create(args.model, data.spec).to(fabric.device)
    few = torch.arange(args.single)
    runs: dict[str, tuple[int, Callable[[], object]]] = {
        "losses, batched": (args.batched, lambda: losses(logits_of(net, data, fabric), data.y)),
        "features, batched": (args.batched, lambda: features_of(net, data, fabric)),
        "losses, one at a time": (args.single, lambda: losses(logits_of(net, data, fabric, few, size=1), data.y[few])),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(args.repeats + 1):
        for name, (count, run) in runs.items():
            rate = count / seconds_of(run)
            if repeat:  # the first round pays for allocation
                rates[name].append(round(rate, 1))
    median = {name: statistics.median(values) for name, values in rates.items()}

    labels = torch.arange(args.samples) % CLASSES
    features = torch.randn(args.samples, WIDTH, generator=torch.Generator().manual_seed(0))
    set_of = Data(
        torch.zeros(args.samples, 1, 1),
        labels,
        Spec("series", (1, 1), tuple("0123456789")),
        [str(i) for i in range(args.samples)],
    )
    class_wise = {}
    for name in ("spectral_signatures", "activation_clustering"):
        split = make_detector(name).split  # type: ignore[attr-defined]

        def score(split: object = split) -> object:
            return split_classes(nn.Identity(), set_of, features, split, "", 1.0)  # type: ignore[arg-type]

        class_wise[name] = [round(seconds_of(score), 2) for _ in range(args.repeats)]
    record = {
        "command": f"python benchmarks/detectors.py --model {args.model}",
        "samples_per_second": rates,
        "batched_over_one_at_a_time": round(median["losses, batched"] / median["losses, one at a time"], 2),
        "seconds_for_one_batched_pass": {
            "samples": args.samples,
            "seconds, worked out": round(args.samples / median["losses, batched"], 1),
        },
        "seconds_on_features": {"shape": [args.samples, WIDTH], "classes": CLASSES, **class_wise},
        "threads": torch.get_num_threads(),
        "environment": environment(fabric),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"detectors-{args.model}.json", record)
    print({key: value for key, value in record.items() if key != "environment"})


if __name__ == "__main__":
    main()
