"""Where a network can be tapped: its blocks, found by watching one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from antibackdoor.errors import InputError

_COUNTED = (nn.modules.conv._ConvNd, nn.Linear)


class Candidate(NamedTuple):
    """A block that can be tapped; depth: convolutions and linear layers run by its end; share: that / all of them."""

    name: str
    depth: int
    share: float


def find_taps(model: nn.Module, example: Tensor, lengths: Tensor | None = None) -> list[Candidate]:
    """The blocks of `model` that can be tapped, in the order in which they run on `example` (a few rows will do).

    Looked at are the children of the model, of `nn.Sequential` and of a network wrapped whole; taken are those that run
    exactly once, return a feature map (rank 3 or 4) and have some layers before and some after them.
    """
    depth = 0
    runs: dict[nn.Module, list[tuple[int, bool]]] = {}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal depth
        depth += isinstance(module, _COUNTED)
        runs.setdefault(module, []).append((depth, feature_map(output) is not None))

    handles = [module.register_forward_hook(record) for module in model.modules()]
    try:
        with undisturbed(model), torch.no_grad():
            call(model, example, lengths)
    finally:
        for handle in handles:
            handle.remove()

    def blocks(parent: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in parent.named_children():
            yield prefix + name, child
            if isinstance(child, nn.Sequential) or not any(is_map for _, is_map in runs.get(child, [])):
                yield from blocks(child, f"{prefix}{name}.")

    order = {module: i for i, module in enumerate(runs)}
    once = [(name, m) for name, m in blocks(model, "") if len(runs.get(m, [])) == 1 and runs[m][0][1]]
    once.sort(key=lambda pair: order[pair[1]])
    found = [Candidate(name, runs[m][0][0], runs[m][0][0] / depth) for name, m in once]
    return [c for c in found if 0 < c.depth < depth]


def choose_tap(candidates: list[Candidate]) -> str:
    """The block whose end is nearest to half of the network's depth; `layer2` of a ResNet-18, -34 and -50.

    Where the model has three top-level stages or more, blocks inside them are not looked at. Of two equally near the
    shallower is taken; of two equally deep (convolution, batch norm, ReLU) the later. InputError without candidates.
    """
    if not candidates:
        raise InputError("this model has no block that can be tapped; give a network built of convolutional blocks.")
    stages = [c for c in candidates if "." not in c.name]
    pool = stages if len(stages) >= 3 else candidates
    return min(reversed(pool), key=lambda c: (round(abs(c.share - 0.5), 9), c.depth)).name


def stages(model: nn.Module, example: Tensor, lengths: Tensor | None = None) -> list[str]:
    """The blocks of `model` by depth, one for each: its top-level stages where it has three or more of them.

    `stem`, `layer1` ... `layer4` of a ResNet; the convolutions with what follows them of a plain `nn.Sequential`.
    Raises InputError where there is none.
    """
    found = find_taps(model, example, lengths)
    top = [c for c in found if "." not in c.name]
    by_depth: dict[int, str] = {}
    for candidate in top if len({c.depth for c in top}) >= 3 else found:
        by_depth.setdefault(candidate.depth, candidate.name)
    if not by_depth:
        raise InputError("this model has no block with a feature map; give a network built of convolutional blocks.")
    return [by_depth[depth] for depth in sorted(by_depth)]


def call(model: nn.Module, x: Tensor, lengths: Tensor | None, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """`model(x, lengths)`, or `model(x)` where there are none or the model does not know of them.

    weights: tensors to use in place of the parameters and buffers of these names, for this call only.
    """
    aware = lengths is not None and "lengths" in inspect.signature(model.forward).parameters
    known = {"lengths": lengths} if aware else {}
    out: Tensor = functional_call(model, dict(weights), (x,), known) if weights else model(x, **known)
    return out


def feature_map(output: Any) -> Tensor | None:
    """The first tensor of a block's output if it is a feature map, (n, C, T) or (n, C, H, W)."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) and first.dim() in {3, 4} else None


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, so that no batch statistics move; afterwards every module is in its former mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
