"""What E2ABL costs over plain training of the same backbone: seconds an epoch, side by side in one run, and parameters.

    python benchmarks/e2abl_cost.py --out results/cost

Plain epochs, warm-up epochs (shallow part and second head only) and dual epochs take turns, so that a noisy machine
hits all of them alike; the ratio of a whole run follows from the medians. The images are random: cost does not depend
on what they show.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path

import torch

from antibackdoor.data.batches import gather
from antibackdoor.data.core import Data, Spec
from antibackdoor.defenses.dual_head import Dual, Trap
from antibackdoor.defenses.e2abl import E2ABL
from antibackdoor.environment import environment
from antibackdoor.files import write_json
from antibackdoor.models.tap import Tap
from antibackdoor.training.job import Job, make_fabric
from antibackdoor.training.loop import Fit, Progress, Recipe
from antibackdoor.training.objectives import CrossEntropy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet34")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60, help="of the whole run that the ratio is worked out for")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    rng = torch.Generator().manual_seed(0)
    x = torch.randint(256, (args.samples, 3, 32, 32), generator=rng, dtype=torch.uint8)
    y = torch.randint(10, (args.samples,), generator=rng)
    spec = Spec("image", (3, 32, 32), tuple("0123456789"))
    data = Data(x, y, spec, [str(i) for i in range(args.samples)])
    job = Job(data, model=args.model, fabric=make_fabric(args.device))
    method = E2ABL()
    recipe = dataclasses.replace(method.main, epochs=args.repeats + 1, min_steps=0)

    tap = Tap(job.model("dual"), None, 10, gather(job.data, torch.arange(2), job.fabric.device).x)
    trap = Trap(method, job)
    dual = Dual(method, job, trap)
    dual.partition(tap, 0)

    def stage(name: str, model: torch.nn.Module, objective: object, recipe: Recipe, parameters: object = None) -> Fit:
        return Fit(name, model, objective, job.data, recipe, parameters=parameters, fabric=job.fabric)  # type: ignore[arg-type]

    plain = stage("plain", job.model("plain"), CrossEntropy(), recipe)
    warm = stage("warm-up", tap, trap, recipe, tap.warm_up_parameters())
    both = stage("dual", tap, dual, recipe)
    seconds: dict[str, list[float]] = {"plain": [], "warm-up": [], "dual": []}
    for repeat in range(args.repeats + 1):
        for fit in (plain, warm, both):
            spent = fit.run_epoch(Progress())["seconds"]
            if repeat:  # the first round pays for allocation and autotuning
                seconds[fit.stage].append(spent)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    warm_up = method.warm_up.epochs if method.warm_up else 0
    total = warm_up * median["warm-up"] + (args.epochs - warm_up) * median["dual"]
    record = {
        "command": f"python benchmarks/e2abl_cost.py --model {args.model} --samples {args.samples}",
        "seconds_per_epoch": seconds,
        "ratio_warm_up_epoch": round(median["warm-up"] / median["plain"], 3),
        "ratio_dual_epoch": round(median["dual"] / median["plain"], 3),
        "ratio_run_of_equal_epochs": {
            "epochs": args.epochs,
            "ratio": round(total / (args.epochs * median["plain"]), 3),
        },
        "parameters": tap.parameter_counts(),
        "environment": environment(job.fabric),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"e2abl-{args.model}.json", record)
    print({key: value for key, value in record.items() if key.startswith(("ratio", "parameters"))})


if __name__ == "__main__":
    main()
