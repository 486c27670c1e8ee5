"""Several devices as one: a network's batches are shared out among them, and so are scoring passes.

Every device runs the same program on the same data with the same random numbers: it draws the same order, augments the
whole batch, computes the same losses from the same logits, and so comes to the same partition. Only the network, which
is nearly all of the work, sees a share: on the way in `Split` keeps this device's samples, on the way out it collects
the answers of all. An objective never notices, so whatever it makes of a batch stays what it is on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, distributed, nn

from antibackdoor.data.batches import Batch, gather, sent
from antibackdoor.data.core import Data
from antibackdoor.seeds import derive
from antibackdoor.training.statistics import WholeBatch


def shared_out(model: nn.Module, fabric: Fabric) -> Callable[[], AbstractContextManager[object]]:
    """Gives contexts within which calls of `model` are split among the devices; with one device they do nothing."""
    return nullcontext if fabric.world_size == 1 else Split(model, fabric).open


class Split:
    """Hooks by which a network computes a share of the batch it is called with and returns the logits of all of it.

    Tensors of one row a sample among the arguments are cut; of the outputs each has one row a sample, or none. A mask
    `(n,)` of bools among the arguments picks the samples of the first output, as `main` of a `Tap`: then each device
    gets its part of both kinds. Every device computes the whole batch where a share would have less than two samples,
    and where the objective looks into the network by hooks of its own, which would see a share.
    Gradients that come in are scaled by the number of devices, so that the mean over these, see `average_gradients`, is
    the gradient of the loss, whether the calls behind it were split or not.
    """

    def __init__(self, model: nn.Module, fabric: Fabric):
        self.model, self.fabric = model, fabric
        self.mode = WholeBatch(lambda value: _all(value, fabric.world_size))
        self.seed, self.calls = torch.initial_seed(), 0
        self.places: list[list[Tensor]] = []
        self.random: list[Tensor] = []

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hooks on, and off again."""
        hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after),
        ]
        try:
            with self.mode:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        n, world = len(args[0]), self.fabric.world_size
        picked = next((v.cpu() for v in (*args, *kwargs.values()) if _has_rows(v, n) and v.dtype == torch.bool), None)
        fewest = n if picked is None else min(n, int(picked.sum()))
        looked_into = any(m._forward_hooks or m._forward_pre_hooks for m in module.modules() if m is not module)
        self.mode.split = fewest >= 2 * world and not looked_into
        if not self.mode.split:
            return None
        shares = list(torch.arange(n).tensor_split(world)) if picked is None else _dealt(picked, world)
        self.places = [shares if picked is None else [share[picked[share]] for share in shares], shares]
        own = shares[self.fabric.global_rank]

        def cut(value: Any) -> Any:
            return value[sent(own, value.device)] if _has_rows(value, n) else value

        self.random = _random_state(self.fabric.device)
        # Dropout differs from call to call and from share to share; all else goes on as if there had been none.
        torch.manual_seed(derive(self.seed, self.calls, self.fabric.global_rank))
        self.calls += 1
        return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.mode.split:
            return None
        self.mode.split = False
        _set_random_state(self.random, self.fabric.device)
        if isinstance(output, Tensor):
            return self._whole(output, self.places[1])
        return tuple(self._whole(part, self.places[min(i, 1)]) for i, part in enumerate(output))

    def _whole(self, part: Tensor, places: list[Tensor]) -> Tensor:
        """The rows of all devices, each where its sample lies in the batch; a part without rows stays without."""
        if not len(part):
            return part
        sizes, rank = [len(place) for place in places], self.fabric.global_rank
        whole: Tensor = _Collect.apply(part, sizes, rank)
        order = torch.cat(places)
        if bool((order[1:] > order[:-1]).all()):
            return whole
        return whole[sent(order.argsort(), whole.device)]


class _Collect(torch.autograd.Function):
    """The parts of all devices one after the other; backwards, each takes its own, scaled by the number of devices."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, sizes: list[int], rank: int) -> Tensor:
        ctx.sizes, ctx.rank = sizes, rank
        return collected(part, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own: Tensor = grad.split(ctx.sizes)[ctx.rank] * len(ctx.sizes)
        return own, None, None


def collected(part: Tensor, sizes: Sequence[int]) -> Tensor:
    """The parts of all devices, of these sizes, one after the other; what a part has beyond its size is left out."""
    padded = part.new_zeros(max(sizes), *part.shape[1:])
    padded[: len(part)] = part[: max(sizes)]
    return torch.cat([rows[:size] for rows, size in zip(_all(padded, len(sizes)), sizes, strict=True)])


def scored(
    answer: Callable[[Batch], Tensor], data: Data, rows: Tensor, size: int, fabric: Fabric, *, whole: bool = False
) -> Iterator[Tensor]:
    """What `answer` gives for `rows`, in their order, some at a time: batches of `size`, in turns among the devices.

    A batch is the same whoever computes it. whole: every device computes all of them.
    """
    batches = rows.split(size)
    world = 1 if whole else fabric.world_size
    for first in range(0, len(batches), world):
        turn = batches[first : first + world]
        own = turn[min(fabric.global_rank, len(turn) - 1)] if world > 1 else turn[0]
        part = answer(gather(data, own, fabric.device))
        sizes = [len(batch) for batch in turn] + [0] * (world - len(turn))
        yield part if world == 1 else collected(part.float(), sizes)


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor], fabric: Fabric) -> None:
    """Put the mean over the devices in the place of every gradient."""
    if fabric.world_size > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        at_once(gradients, _mean)


@torch.no_grad()
def agree(tensors: Iterable[Tensor], fabric: Fabric) -> None:
    """Give every device the tensors of the first, in place: no device may come to another decision by a last bit."""
    if fabric.world_size > 1:
        at_once(tensors, _from_first)


def at_once(tensors: Iterable[Tensor], reduce: Callable[[Tensor], Tensor]) -> None:
    """Reduce tensors in place, as one long vector for each type: one message instead of hundreds."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for some in by_type.values():
        whole = reduce(torch.cat([tensor.flatten() for tensor in some]))
        for tensor, part in zip(some, whole.split([tensor.numel() for tensor in some]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _has_rows(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == n


def _dealt(picked: Tensor, world: int) -> list[Tensor]:
    """Which samples each device takes, so that all have as many of those picked, give or take one; in their order."""
    both = torch.cat([picked.nonzero().flatten(), (~picked).nonzero().flatten()])
    return [both[rank::world].sort().values for rank in range(world)]


def _all(value: Tensor, world: int) -> Tensor:
    """`(world, ...)`; straight to the library, since Fabric's collectives let the program wait for all devices."""
    found = value.new_empty(world * len(value), *value.shape[1:])
    distributed.all_gather_into_tensor(found, value.detach().contiguous())
    return found.view(world, *value.shape)


def _mean(flat: Tensor) -> Tensor:
    distributed.all_reduce(flat)
    return flat / distributed.get_world_size()


def _from_first(flat: Tensor) -> Tensor:
    distributed.broadcast(flat, 0)
    return flat


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
