"""`--compile`: stages that allow it train a compiled network, and nobody else notices."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import antibackdoor
from antibackdoor.data.batches import Batch
from antibackdoor.errors import InputError
from antibackdoor.files import load_state
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe
from antibackdoor.training.objectives import CrossEntropy, Objective, Step
from tiny import FABRIC
from toy import toy_images

SHORT = {"recipe.epochs": 2, "recipe.min_steps": 0}
FEW = ("epochs", "min_steps")
real = torch.compile


class Noted(CrossEntropy):
    """Says what it was given in place of the model."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        self.given.append(type(model).__name__)
        return super().__call__(model, batch)


class LooksInside(Noted):
    compiles = False


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traces the network as the real compiler does, and then runs what was traced without generating code."""
    monkeypatch.setattr(torch, "compile", partial(real, backend="eager"))
    yield
    torch._dynamo.reset()


def trained(objective: Objective, folder: Path | None = None, *, compiled: bool, epochs: int = 2) -> Tensor:
    job = Job(toy_images(40), model="resnet18-w4", fabric=FABRIC, folder=folder, compiled=compiled)
    job.checkpoint_seconds = 0.0
    model = job.model()
    job.fit("training", model, objective, Recipe(epochs=epochs, min_steps=0, schedule="constant"))
    return torch.cat([value.detach().flatten().double() for value in model.state_dict().values()])


@pytest.mark.usefixtures("quick")
def test_a_compiled_network_learns_the_same() -> None:
    eager, compiled = Noted(), Noted()
    assert torch.equal(trained(eager, compiled=False), trained(compiled, compiled=True))
    assert set(eager.given) == {"ResNet"} and set(compiled.given) == {"OptimizedModule"}


@pytest.mark.usefixtures("quick")
def test_who_looks_inside_gets_the_network_itself() -> None:
    noted = LooksInside()
    trained(noted, compiled=True)
    assert set(noted.given) == {"ResNet"}


@pytest.mark.usefixtures("quick")
def test_a_run_may_go_on_compiled_or_not(tmp_path: Path) -> None:
    whole = trained(CrossEntropy(), compiled=False)
    trained(CrossEntropy(), tmp_path, compiled=True, epochs=1)
    names = load_state(tmp_path / "stages" / "training.safetensors")["fit"]["model"]
    assert not any(name.startswith("_orig_mod") for name in names)
    assert torch.equal(trained(CrossEntropy(), tmp_path, compiled=False), whole)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("defense", ["none", "nad"])
def test_what_comes_out_is_a_plain_module(defense: str) -> None:
    settings: dict[str, Any] = {"options": SHORT}
    if defense == "nad":
        short = {f"{stage}.{name}": 1 for stage in ("training", "teacher", "distillation") for name in FEW}
        settings = {"options": short, "clean": toy_images(20)}
    result = antibackdoor.train(
        toy_images(40), defense=defense, model="resnet18-w4", device="cpu", compiled=True, **settings
    )
    assert type(result.model).__name__ == "ResNet"
    assert not any("_orig_mod" in name for name in result.model.state_dict())


def test_a_machine_that_cannot_compile_says_so_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: Any, example: Any) -> Any:
        raise RuntimeError("no compiler is here")

    monkeypatch.setattr(torch, "compile", partial(real, backend=refuse))
    with pytest.raises(InputError, match=r"cannot be compiled here \(.*no compiler is here.*\); leave out --compile"):
        trained(CrossEntropy(), compiled=True)
    torch._dynamo.reset()


def test_several_devices_do_not_compile() -> None:
    with pytest.raises(InputError, match="one device"):
        antibackdoor.train(toy_images(20), devices=2, device="cpu", compiled=True)


@pytest.mark.slow
def test_generated_code_computes_the_same_gradients() -> None:
    job = Job(toy_images(40), model="resnet18-w8", fabric=FABRIC)
    x = job.data.spec.decode(job.data.x)
    found = []
    for compiled in (False, True):
        model = job.model().double()
        called = real(model) if compiled else model
        called(x.double()).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*found, rtol=1e-6, atol=1e-9)
