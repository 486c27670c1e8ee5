"""Networks of timm, by name ("timm:resnet18"): architecture only; weights come from local files, never from a hub."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from antibackdoor.data.core import Spec
from antibackdoor.errors import InputError, unknown
from antibackdoor.models.layers import Normalize

PREFIX = "timm:"


class Library(nn.Module):
    """A timm network behind our normalization, so that it takes raw images like every other model here."""

    def __init__(self, body: nn.Module, channels: int):
        super().__init__()
        self.normalize = Normalize(2, channels)
        self.body = body

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits `(n, K)` of images `(n, C, H, W)` in [0, 1]."""
        logits: Tensor = self.body(self.normalize((x, None))[0])
        return logits

    def embed(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Features `(n, D)` that the last layer sees."""
        features: Tensor = self.body.forward_head(  # type: ignore[operator]
            self.body.forward_features(self.normalize((x, None))[0]),  # type: ignore[operator]
            pre_logits=True,
        )
        return features


def create_library(name: str, spec: Spec) -> nn.Module:
    """A freshly initialized timm network for images of `spec`; `name` without its prefix.

    Raises InputError without timm, for a name that timm does not have, for series, and for a network that does not take
    images of this size.
    """
    called = f"model '{PREFIX}{name}'"
    if spec.kind != "image":
        raise InputError(f"{called} does not take data of kind {spec.kind!r}; timm's networks take images.")
    try:
        import timm
    except ImportError:
        raise InputError(f"{called} needs timm: install it with  pip install 'antibackdoor[timm]'") from None
    known = timm.list_models()
    if name not in known:
        raise unknown("timm model", name, known)
    channels, height, width = spec.shape
    arguments: dict[str, Any] = {"pretrained": False, "num_classes": len(spec.classes), "in_chans": channels}
    try:
        try:  # networks with position embeddings want to know the size, others do not know the word
            body = timm.create_model(name, img_size=(height, width), **arguments)
        except TypeError:
            body = timm.create_model(name, **arguments)
        model = Library(body, channels)
        _check_takes(model, spec)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # what a network says about a size it does not take is anybody's guess
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{called} does not take {width}x{height} images: {reason}.") from None
    return model


def _check_takes(model: nn.Module, spec: Spec) -> None:
    """One image through the network, with its state left as it is."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.zeros(2, *spec.shape))
    model.train()
    if logits.shape != (2, len(spec.classes)):
        raise InputError(f"it returns {tuple(logits.shape)} instead of one number a class")
