"""Tap any network in the middle: a shallow part with a head of its own, and the deep part behind it.

A backdoor is learned early and by shallow layers. A second head on those traps the samples that carry one, while the
deep part is trained on other rows. Both parts come out of ONE forward pass: a hook on the tapped block keeps the
features of the whole batch for the second head and hands on only some rows, so that the deep part, and the statistics
of its batch norms, never meet the others. Hooks live only as long as a call; the backbone stays a plain module.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from antibackdoor.data.batches import sent
from antibackdoor.errors import InputError, unknown
from antibackdoor.models.blocks import call, choose_tap, feature_map, find_taps, undisturbed
from antibackdoor.models.layers import ConvNorm, State, average, he_init

__all__ = ["SecondHead", "Tap", "choose_tap", "find_taps"]


class SecondHead(nn.Module):
    """Two convolutions (3 wide, stride 2, batch norm, ReLU), global average, linear: feature map -> logits `(n, K)`."""

    def __init__(self, dims: int, c_in: int, channels: tuple[int, int], num_classes: int):
        super().__init__()
        self.conv1 = ConvNorm(dims, c_in, channels[0], 3, 2)
        self.conv2 = ConvNorm(dims, channels[0], channels[1], 3, 2)
        self.fc = nn.Linear(channels[1], num_classes)
        self.apply(he_init)

    def forward(self, state: State) -> Tensor:
        """`(feature map, mask)` -> logits."""
        logits: Tensor = self.fc(average(self.conv2(self.conv1(state))))
        return logits


class Tap(nn.Module):
    """A backbone with a second head behind its block `at`.

    at: a name from `find_taps`; None: `choose_tap` decides. example: a few input rows, on any device.
    The head's convolutions have 2 and 4 times the channels of the tapped map, at most 256 and 512 (else the head of a
    ResNet-50 would outweigh its backbone); `wide`: 4 and 4 times, at most 512.
    shared: False gives the second head a freshly initialized shallow part of its own (ablation: two models).
    A backbone that uses `lengths` behind the tap must carry them through it, as the models here carry their mask.
    Raises InputError for a block that is not there, and for one that does not cut the network in two.
    """

    def __init__(
        self,
        model: nn.Module,
        at: str | None,
        num_classes: int,
        example: Tensor,
        lengths: Tensor | None = None,
        *,
        wide: bool = False,
        shared: bool = True,
    ):
        super().__init__()
        device = next(model.parameters()).device
        example = example.to(device)
        candidates = find_taps(model, example, lengths)
        self.at = choose_tap(candidates) if at is None else at
        if self.at not in {c.name for c in candidates}:
            raise unknown("block", self.at, [c.name for c in candidates])
        self.backbone: nn.Module = model
        self.shared = shared
        self._stem, features = self._trace(example, lengths)
        self._check_cut(example, lengths)
        c = features.shape[1]
        second = min(4 * c, 512)
        channels = second if wide else min(2 * c, 256), second
        self.head = SecondHead(features.dim() - 2, c, channels, num_classes)
        self.head.to(device)
        self.second_backbone: nn.Module | None = None
        if not shared:
            self.second_backbone = copy.deepcopy(model)
            self.second_backbone.apply(_restart)
            for name, parameter in self.second_backbone.named_parameters():
                parameter.requires_grad_(name in self._stem)

    def shallow(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits of the second head, `(n, K)`; the deep part does not run."""
        logits: Tensor = self(x, lengths, main=torch.empty(0, dtype=torch.long))[1]
        return logits

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, main: Tensor | None = None, detach: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Logits of the main head for the rows `main` (bool mask, row numbers, None = all), and of the second for all.

        A mask had better be in main memory: the size of what follows depends on it.

        detach: no gradient from the second head into the shallow part. With no row in `main` the deep part does not
        run, and the first logits are `(0, K)`.
        """
        rows = main
        if main is not None and main.dtype == torch.bool:  # found in main memory, where nothing has to be waited for
            rows = sent(torch.from_numpy(np.flatnonzero(main.cpu().numpy())), x.device)
        if self.second_backbone is None:
            logits, output = self._run(self.backbone, x, lengths, rows)
            second = self._second(output, detach)
        else:
            _, output = self._run(self.second_backbone, x, lengths, rows=torch.empty(0, dtype=torch.long))
            second = self._second(output, detach)
            own_x, own_lengths = _take((x, lengths), rows, len(x))
            logits = call(self.backbone, own_x, own_lengths) if len(own_x) else None
        return (second[:0] if logits is None else logits), second

    def parameter_counts(self) -> dict[str, float]:
        """Parameters of the backbone, of what the second head adds, and how many times the backbone both are."""
        backbone, head = (sum(p.numel() for p in ps) for ps in (self.main_parameters(), self.second_parameters()))
        return {"backbone": backbone, "head": head, "ratio": (backbone + head) / backbone}

    def main_parameters(self) -> list[nn.Parameter]:
        """All of the backbone."""
        return list(self.backbone.parameters())

    def second_parameters(self) -> list[nn.Parameter]:
        """The second head and, where it is not shared, its own shallow part."""
        return [*self.head.parameters(), *(self._stem_parameters(self.second_backbone) if self.second_backbone else ())]

    def warm_up_parameters(self) -> list[nn.Parameter]:
        """What `shallow` trains: the shallow part it runs on, and the second head."""
        return [*self._stem_parameters(self.second_backbone or self.backbone), *self.head.parameters()]

    def _stem_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        return [parameter for name, parameter in model.named_parameters() if name in self._stem]

    def _trace(self, example: Tensor, lengths: Tensor | None) -> tuple[frozenset[str], Tensor]:
        """Names of the parameters that the tapped features depend on, and the features of `example`."""
        named = [(name, p) for name, p in self.backbone.named_parameters() if p.requires_grad]
        with undisturbed(self.backbone), torch.enable_grad():
            _, output = self._run(self.backbone, example, lengths, torch.empty(0, dtype=torch.long))
            features = feature_map(output)
            assert features is not None  # find_taps saw a feature map
            grads = torch.autograd.grad(features.sum(), [p for _, p in named], allow_unused=True)
        return frozenset(name for (name, _), grad in zip(named, grads, strict=True) if grad is not None), features

    def _check_cut(self, example: Tensor, lengths: Tensor | None) -> None:
        """Refuse a block that another path leads around: rows left out at the tap would still reach the deep part."""
        rows = torch.zeros(3, dtype=torch.long, device=example.device)
        x, lengths = _take((example, lengths), rows, len(example))
        try:
            with undisturbed(self.backbone), torch.no_grad():
                logits, _ = self._run(self.backbone, x, lengths, rows[:2])
        except RuntimeError:  # two rows met three
            logits = None
        if logits is None or len(logits) != 2:
            raise InputError(f"block {self.at!r} does not cut the network in two: another path leads around it.")

    def _run(
        self, model: nn.Module, x: Tensor, lengths: Tensor | None, rows: Tensor | None
    ) -> tuple[Tensor | None, Any]:
        """(logits of `rows`, output of the tapped block for all rows); the deep part runs unless `rows` is empty."""
        kept: list[Any] = []

        def fork(module: nn.Module, args: Any, output: Any) -> Any:
            kept.append(output)
            if rows is not None and len(rows) == 0:
                raise _Enough
            return _take(output, rows, len(x))

        handle = model.get_submodule(self.at).register_forward_hook(fork)
        try:
            return call(model, x, lengths), kept[0]
        except _Enough:
            return None, kept[0]
        finally:
            handle.remove()

    def _second(self, output: Any, detach: bool) -> Tensor:
        features = feature_map(output)
        assert features is not None
        mask = output[1] if isinstance(output, tuple | list) and len(output) == 2 else None
        mask = mask if isinstance(mask, Tensor) and mask.dtype == torch.bool else None
        logits: Tensor = self.head((features.detach() if detach else features, mask))
        return logits


class _Enough(Exception):
    """Ends a forward pass at the tap."""


def _take(output: Any, rows: Tensor | None, n: int) -> Any:
    """The given rows of every tensor in `output` that has one row a sample."""
    if rows is None:
        return output
    if isinstance(output, Tensor):
        return output[rows.to(output.device)] if output.dim() and len(output) == n else output
    if isinstance(output, tuple | list):
        return type(output)(_take(part, rows, n) for part in output)
    return output


def _restart(module: nn.Module) -> None:
    """Forget what was learned: PyTorch's own initialization of a layer, He's for convolutions."""
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()
    he_init(module)
