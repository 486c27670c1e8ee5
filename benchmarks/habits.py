"""What habits of other code cost, rebuilt as small reference loops of our own: same model, same steps.

The reference keeps one PNG file for each poisoned sample and opens it whenever it is asked for; turns each sample into
a PIL image, resizes, crops and flips it and turns it back, one by one; looks for poison with a loss scan of one sample
at a time and a second such pass that splits the data; and after each epoch passes three times over the test images:
clean, triggered, and triggered again with the true labels. Ours trains with `Job.fit`, scores in one batched pass, and
measures once, at the end, from one pass over the clean and one over the triggered images.

All of that code computes in float32. Ours takes bfloat16 where the processor or the GPU has it; there the reference
stands twice, as the others run and in our precision, so that what the precision gains can be told from the rest.

Parts take turns; a run as the others make it - 50,000 training and 10,000 test images, one scan - follows from them
round by round.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from antibackdoor.data.core import Data
from antibackdoor.environment import environment
from antibackdoor.training.job import Job, make_fabric
from antibackdoor.training.loop import Progress, Recipe
from antibackdoor.training.objectives import CrossEntropy
from antibackdoor.training.scores import logits_of, losses
from benchmarks.turns import endless, random_images, ratio, rounded, take_turns

TRAIN, TEST = 50_000, 10_000


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="wideresnet16_1")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10, help="of the run that the ratio is worked out for")


def measure(args: argparse.Namespace, fabric: Fabric) -> dict[str, Any]:
    references = {"reference": make_fabric(args.device, "32-true")}
    if environment(fabric)["precision"] != "32-true":
        references["reference in our precision"] = fabric
    parts: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, its in references.items():
            reference = Reference(random_images(args.samples), Path(folder), args, its)
            parts |= {
                f"{name}, epoch": reference.epoch,
                f"{name}, scan": reference.scan,
                f"{name}, test pass": reference.test_pass,
            }
        seconds = take_turns({**parts, **ours(args, fabric)}, args.repeats, fabric.device)
    n, epochs, title = args.samples, args.epochs, args.model

    def run(epoch: str, scan: str, test: str, scans: int, passes: int) -> list[float]:
        """Seconds of the whole run; the triggered images are as many as the clean ones."""
        return [
            epochs * TRAIN / n * a + scans * TRAIN / n * b + passes * TEST / n * c
            for a, b, c in zip(seconds[epoch], seconds[scan], seconds[test], strict=True)
        ]

    own = run("our epoch", "our scan", "our scan", 1, 2)
    ratios = {}
    for name in references:
        theirs = run(f"{name}, epoch", f"{name}, scan", f"{name}, test pass", 2, 3 * epochs)
        least = 3 if name == "reference" else None
        ratios |= {
            f"a run of {epochs} epochs with a scan, {name} over ours, {title}": ratio(theirs, own, least=least),
            f"an epoch of training, {name} over ours, {title}": ratio(seconds[f"{name}, epoch"], seconds["our epoch"]),
            f"the two passes of the loss scan, {name} over our one, {title}": ratio(
                seconds[f"{name}, scan"], seconds["our scan"], scale=2
            ),
            f"three test passes an epoch, {name}, over two at the end, {epochs} epochs, {title}": ratio(
                seconds[f"{name}, test pass"], seconds["our scan"], scale=3 * epochs / 2
            ),
        }
    return {"ratios": ratios, "seconds": rounded(seconds), "samples": n}


def ours(args: argparse.Namespace, fabric: Fabric) -> dict[str, Any]:
    data = random_images(args.samples)
    job = Job(data, model=args.model, fabric=fabric)
    model = job.model()
    fit = endless(job, "ours", model, CrossEntropy(), Recipe(batch_size=args.batch))
    return {
        "our epoch": lambda: fit.run_epoch(Progress()),
        "our scan": lambda: losses(logits_of(model, job.data, fabric), data.y),
    }


class Reference:
    """The habits."""

    def __init__(self, data: Data, folder: Path, args: argparse.Namespace, fabric: Fabric):
        assert isinstance(data.x, Tensor)
        self.images, self.labels, self.fabric, self.batch = data.x, data.y, fabric, args.batch
        self.model = Job(data, model=args.model, fabric=fabric).model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        self.poisoned = {}
        for row in range(0, len(data), 10):
            self.poisoned[row] = folder / f"{row}.png"
            Image.fromarray(data.x[row].permute(1, 2, 0).numpy()).save(self.poisoned[row])
        ends = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        side = data.spec.shape[1]
        self.plain = v2.Compose([v2.Resize((side, side)), *ends])
        self.random = v2.Compose([v2.Resize((side, side)), v2.RandomCrop(side, 4), v2.RandomHorizontalFlip(), *ends])

    def sample(self, row: int, transform: v2.Compose) -> Tensor:
        """One sample through PIL."""
        if row in self.poisoned:
            with Image.open(self.poisoned[row]) as file:
                image = copy.deepcopy(file.convert("RGB"))
        else:
            image = v2.functional.to_pil_image(self.images[row])
        made: Tensor = transform(image)
        return made

    def gathered(self, rows: Tensor, transform: v2.Compose) -> tuple[Tensor, Tensor]:
        x = torch.stack([self.sample(row, transform) for row in rows.tolist()])
        return x.to(self.fabric.device), self.labels[rows].to(self.fabric.device)

    def epoch(self) -> None:
        self.model.train()
        for rows in torch.randperm(len(self.images)).split(self.batch):
            x, y = self.gathered(rows, self.random)
            with self.fabric.autocast():
                loss = F.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()

    @torch.no_grad()
    def scan(self) -> None:
        """One of the two passes; each sample's loss comes back from the device before the next is looked at."""
        self.model.eval()
        for row in torch.arange(len(self.images)):
            x, y = self.gathered(row[None], self.plain)
            with self.fabric.autocast():
                F.cross_entropy(self.model(x), y).item()

    @torch.no_grad()
    def test_pass(self) -> None:
        """One of the three, over as many images as the training set has here."""
        self.model.eval()
        for rows in torch.arange(len(self.images)).split(self.batch):
            x, y = self.gathered(rows, self.plain)
            with self.fabric.autocast():
                (self.model(x).argmax(1) == y).sum().item()
