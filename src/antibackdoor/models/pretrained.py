"""Weights from a local file into a network, for fine-tuning: what fits is taken, only the head may differ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from antibackdoor.errors import InputError
from antibackdoor.limits import refuse_special
from antibackdoor.models.layers import Normalize

MAX_BYTES = 16 * 2**30
"""No network of this kind has more."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file. Pickled files (.pt, .pth, .bin) can run code and are never read."""
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"{path} is no .safetensors file; pickled weights can run code and are never read.")
    if not path.is_file():
        raise InputError(f"the weights {path} do not exist.")
    refuse_special(path, MAX_BYTES)
    try:
        return load_file(path)
    except MemoryError:
        raise
    except Exception as error:  # safetensors raises its own type, which it does not export for catching
        raise InputError(f"cannot read the weights {path}: {str(error).splitlines()[0]}.") from None


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a `.safetensors` file, from its header alone."""
    refuse_special(path, MAX_BYTES)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except MemoryError:
        raise
    except Exception as error:  # safetensors raises its own type, which it does not export for catching
        raise InputError(f"cannot read the weights {path}: {str(error).splitlines()[0]}.") from None


def fingerprint(path: Path) -> str:
    """A content hash of a file."""
    digest = hashlib.sha256()
    if not path.is_file():
        raise InputError(f"the weights {path} do not exist.")
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:32]


def digest(model: nn.Module) -> str:
    """A content hash of a network's weights, names and shapes included."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):  # a module may keep anything else there, too
            found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def take_weights(model: nn.Module, weights: Mapping[str, Tensor], where: object) -> list[str]:
    """Fill `model` in place; returns the names of the head's tensors that keep their fresh values.

    Names may carry a prefix in the file or in the model ("body.", "module.", "model."). Everything must be there and of
    the same shape but for the last layer, whose number of classes may differ. Normalization is taken over where the
    file has one. Raises InputError that names the first tensors that do not fit.
    """
    own = model.state_dict()
    renamed = _renamed(own, weights)
    head = _head(model)
    own_statistics = {f"{name}.{part}" for name, module in model.named_modules() if isinstance(module, Normalize)
                      for part in ("mean", "std")}  # fmt: skip
    fresh = [name for name in own if name not in renamed or renamed[name].shape != own[name].shape]
    wrong = [name for name in fresh if not (head and name.startswith(f"{head}.")) and name not in own_statistics]
    if wrong or not all(value.isfinite().all() for value in renamed.values() if value.is_floating_point()):
        listed = ", ".join(wrong[:3]) + ("..." if len(wrong) > 3 else "") if wrong else "values that are not finite"
        raise InputError(f"{where} does not fit this model ({listed}); give the --model that it was made for.")
    taken = {name: renamed[name] for name in own if name not in fresh}
    model.load_state_dict(taken, strict=False)
    return [name for name in fresh if name not in own_statistics]


def _renamed(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors under the model's names, with the prefixes that fit best."""
    best: dict[str, Tensor] = {}
    for drop in ("", "module.", "model.", "body.", "backbone."):
        for add in ("", "body."):
            named = {add + name.removeprefix(drop): value for name, value in weights.items()}
            found = {name: value for name, value in named.items() if name in own}
            best = max(best, found, key=len)
    return best


def _head(model: nn.Module) -> str | None:
    """The name of the last linear layer."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None
