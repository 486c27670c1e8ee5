"""Whether a step of FixMatch is bound by the model: time outside forward and backward, and against a PIL pipeline.

    python benchmarks/fixmatch.py --model wideresnet16_1 --out results/cost

Four things take turns, so that a noisy machine hits all of them alike: whole steps as a defense runs them (gathering,
weak and strong views, forward, backward, optimizer, averaged weights, records); forward and backward alone, on a batch
of views made before; making the views alone; and making the same views from PIL images one by one with torchvision
(crop, flip, RandAugment(2, 10), a hole of half a side) in one process. The images are random: cost does not depend on
what they show. On a CPU seconds are those that this process was given, of all its threads: other processes of a busy
machine do not count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms import v2

from antibackdoor.data.batches import gather
from antibackdoor.data.core import Data, Spec
from antibackdoor.environment import environment
from antibackdoor.files import write_json
from antibackdoor.training.job import Job, make_fabric
from antibackdoor.training.loop import Fit, Progress
from antibackdoor.training.semi_supervised import FixMatch, SemiSupervised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wideresnet16_1")
    parser.add_argument("--batch", type=int, default=64, help="labeled samples a step")
    parser.add_argument("--steps", type=int, default=2, help="in a turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    recipe = SemiSupervised(batch_size=args.batch, epochs=args.repeats + 1, min_steps=0)
    unlabeled = recipe.ratio * args.batch
    n = max(20 * args.batch, args.steps * unlabeled)
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(256, (n, 3, 32, 32), generator=rng, dtype=torch.uint8)
    spec = Spec("image", (3, 32, 32), tuple("0123456789"))
    data = Data(x, torch.randint(10, (n,), generator=rng), spec, [str(i) for i in range(n)])
    job = Job(data, model=args.model, fabric=make_fabric(args.device))
    device, model = job.fabric.device, job.model()
    match = FixMatch(job, model, recipe, torch.arange(10 * args.batch))
    rows = torch.arange(args.steps * unlabeled)
    fit = Fit("fixmatch", model, match, job.data, recipe, rows=rows, fabric=job.fabric)
    noise = torch.Generator(device).manual_seed(0)
    plain = gather(job.data, rows[:unlabeled], device)
    ready = match.prepare(plain, lambda batch, _: batch, noise)
    pictures = [v2.functional.to_pil_image(image) for image in x[: args.batch + unlabeled]]

    def model_alone() -> None:
        with job.fabric.autocast():
            loss = match(model, ready).loss
        fit.optimizer.zero_grad(set_to_none=True)
        job.fabric.backward(loss)

    parts: dict[str, Callable[[], object]] = {
        "whole step": lambda: fit.run_epoch(Progress()),  # args.steps of them
        "forward and backward": model_alone,
        "views": lambda: match.prepare(plain, lambda batch, _: batch, noise),
        "views by PIL": lambda: pil_views(pictures, args.batch, device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(args.repeats + 1):
        for name, part in parts.items():
            turns = 1 if name in {"whole step", "views by PIL"} else args.steps
            spent = timed(part, turns, device) / (args.steps if name == "whole step" else 1)
            if repeat:  # the first round pays for allocation and autotuning
                seconds[name].append(spent)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    outside = 1 - median["forward and backward"] / median["whole step"]
    by_pil = median["whole step"] - median["views"] + median["views by PIL"]
    record = {
        "command": f"python benchmarks/fixmatch.py --model {args.model} --batch {args.batch} --steps {args.steps} "
        f"--repeats {args.repeats}",
        "images_a_step": {"labeled": args.batch, "unlabeled": unlabeled, "views": len(ready.x)},
        "seconds": seconds,
        "share_outside_forward_and_backward": round(outside, 4),
        "share_of_views": round(median["views"] / median["whole step"], 4),
        "rate_of_views_over_pil": round(median["views by PIL"] / median["views"], 2),
        "rate_of_steps_over_pil": round(by_pil / median["whole step"], 3),
        "environment": environment(job.fabric),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"fixmatch-{args.model}-{device.type}.json", record)
    print({key: value for key, value in record.items() if key.startswith(("share", "rate", "images"))})


def timed(part: Callable[[], object], turns: int, device: torch.device) -> float:
    """Seconds a turn, the device's queue emptied before and after."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = clock()
    for _ in range(turns):
        part()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - started) / turns


WEAK = [v2.RandomHorizontalFlip(), v2.RandomCrop(32, padding=4)]
TENSOR = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
HOLE = v2.RandomErasing(p=1, scale=(0.25, 0.25), ratio=(1, 1))
EASY = v2.Compose([*WEAK, *TENSOR])
HARD = v2.Compose([*WEAK, v2.RandAugment(2, 10), *TENSOR, HOLE])


def pil_views(pictures: list, labeled: int, device: torch.device) -> Tensor:
    """Weak views of all pictures and strong ones of all but the labeled first, one picture after the other."""
    views = [EASY(picture) for picture in pictures] + [HARD(picture) for picture in pictures[labeled:]]
    return torch.stack(views).to(device)


if __name__ == "__main__":
    main()
