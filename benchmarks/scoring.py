"""What scoring costs: one batched pass against one sample at a time, losses kept in the training pass, and features.

No augmentation, no gradient, the same network in all. One at a time is measured on a few samples, since the cost of one
does not depend on how many there are. The features of the class-wise detectors are drawn from normal distributions.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from antibackdoor.data.core import Data, Spec
from antibackdoor.detectors import make_detector
from antibackdoor.detectors.base import split_classes
from antibackdoor.models import create
from antibackdoor.training.scores import features_of, logits_of, losses, pass_size
from benchmarks.turns import CLASSES, random_images, ratio, rounded, take_turns

WIDTH = 512


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet18-w16")
    parser.add_argument("--batched", type=int, default=1024, help="samples that are scored in batches")
    parser.add_argument("--single", type=int, default=64, help="samples that are scored one at a time")
    parser.add_argument("--features", type=int, default=10_000, help="rows of features for the class-wise detectors")


def measure(args: argparse.Namespace, fabric: Fabric) -> dict[str, Any]:
    data = random_images(args.batched)
    torch.manual_seed(0)
    net = create(args.model, data.spec).to(fabric.device)
    few = torch.arange(args.single)
    kept = torch.full((len(data),), torch.nan, device=fabric.device)
    parts, values = torch.randperm(len(data)).to(fabric.device).split(128), torch.rand(128, device=fabric.device)

    def one_at_a_time() -> None:
        for row in few:  # as others do it: a forward pass and a wait for the device for each sample
            float(losses(logits_of(net, data, fabric, row[None]), data.y[row[None]]))

    def keep() -> None:
        for rows in parts:
            kept[rows] = values[: len(rows)].float()

    seconds = take_turns(
        {
            "losses, batched": lambda: losses(logits_of(net, data, fabric), data.y),
            "losses, batches of 512": lambda: losses(logits_of(net, data, fabric, size=512), data.y),
            "features, batched": lambda: features_of(net, data, fabric),
            "losses, one at a time": one_at_a_time,
            "losses kept while training": keep,
        },
        args.repeats,
        fabric.device,
    )
    scale = args.batched / args.single
    single = seconds["losses, one at a time"]
    record = {
        f"batched over one at a time, {args.model}": ratio(single, seconds["losses, batched"], scale=scale, least=100),
        f"kept while training over one at a time, {args.model}": ratio(
            single, seconds["losses kept while training"], scale=scale, least=100
        ),
        f"batches of {pass_size(data, fabric)} over batches of 512, {args.model}": ratio(
            seconds["losses, batches of 512"], seconds["losses, batched"]
        ),
    }
    return {
        "ratios": record,
        "seconds": rounded(seconds),
        "batched": args.batched,
        "one_at_a_time": args.single,
        "seconds_on_features": {"shape": [args.features, WIDTH], **class_wise(args, fabric)},
    }


def class_wise(args: argparse.Namespace, fabric: Fabric) -> dict[str, float]:
    """Median seconds of the detectors that split the features of each class."""
    labels = torch.arange(args.features) % len(CLASSES)
    features = torch.randn(args.features, WIDTH, generator=torch.Generator().manual_seed(0))
    ids = [str(row) for row in range(args.features)]
    data = Data(torch.zeros(args.features, 1, 1), labels, Spec("series", (1, 1), CLASSES), ids)

    def score(name: str) -> object:
        split = make_detector(name).split  # type: ignore[attr-defined]
        return split_classes(nn.Identity(), data, features, split, "", 1.0)  # type: ignore[arg-type]

    names = ("spectral_signatures", "activation_clustering")
    seconds = take_turns(
        {name: (lambda name=name: score(name)) for name in names},  # type: ignore[misc]
        args.repeats,
        fabric.device,
    )
    return {name: round(statistics.median(values), 3) for name, values in seconds.items()}
