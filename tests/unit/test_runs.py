from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from antibackdoor.data.core import Data
from antibackdoor.defenses import Outcome
from antibackdoor.errors import InputError
from antibackdoor.models import create
from antibackdoor.runs import load_model, save_model
from antibackdoor.runs import open_folder as opened
from antibackdoor.training.scores import logits_of
from antibackdoor.verdict import decide
from tiny import FABRIC
from toy import toy_images, toy_series

Part = tuple[int, int]


def open_folder(folder: Path, config: dict[str, Any], *, resume: bool) -> bool:
    with opened(folder, config, resume=resume) as finished:
        return finished


def test_a_folder_is_taken_up_only_by_the_same_run(tmp_path: Path) -> None:
    folder, config = tmp_path / "a" / "run", {"seed": 0, "shape": (1, 2)}
    assert not open_folder(folder, config, resume=False)
    with pytest.raises(InputError, match="not empty"):
        open_folder(folder, config, resume=False)
    assert not open_folder(folder, config, resume=True)
    with pytest.raises(InputError, match="other data or settings"):
        open_folder(folder, {**config, "seed": 1}, resume=True)
    (folder / "result.json").write_text("{}")
    assert open_folder(folder, config, resume=True)
    assert json.loads((folder / "config.json").read_text()) == {"seed": 0, "shape": [1, 2]}


def test_an_empty_folder_is_fine_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert not open_folder(tmp_path / "empty", {}, resume=False)
    (tmp_path / "file").touch()
    for resume in (False, True):
        with pytest.raises(InputError, match="file"):
            open_folder(tmp_path / "file", {}, resume=resume)


def test_a_folder_of_something_else_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(InputError, match=r"no config\.json"):
        open_folder(tmp_path, {}, resume=True)


@pytest.fixture(params=[toy_images(6), toy_series(6, unequal=True)], ids=["image", "series"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, nn.Module, Data]:
    data = request.param
    model = create("resnet18-w4", data.spec)
    for _ in range(2):  # running statistics of their own
        logits_of(model.train(), data, FABRIC)
        model(data.spec.decode(data.x[torch.arange(6)]))
    save_model(tmp_path, model, "resnet18-w4", data.spec)
    return tmp_path, model, data


def test_a_saved_model_predicts_the_same(saved: tuple[Path, nn.Module, Data]) -> None:
    folder, model, data = saved
    loaded, spec = load_model(folder)
    assert spec == data.spec and not loaded.training
    assert torch.equal(logits_of(loaded, data, FABRIC), logits_of(model, data, FABRIC))


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "resnet99"},
        {"architecture": "resnet34-w4"},
        {"architecture": "resnet18-w8"},
        {"architecture": 5},
        {"architecture": None},
        {"kind": "video"},
        {"kind": "video", "architecture": "auto"},
        {"shape": "3"},
        {"shape": [5, 12, 12]},
        {"classes": ["a", "b"]},
        {"low": "x"},
        {"more": 1},
    ],
)
def test_a_changed_card_is_refused(saved: tuple[Path, nn.Module, Data], change: dict[str, Any]) -> None:
    folder = saved[0]
    card = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**card, **change}))
    with pytest.raises(InputError):
        load_model(folder)


@pytest.mark.parametrize("file", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "text"])
def test_missing_and_damaged_files(saved: tuple[Path, nn.Module, Data], file: str, damage: str) -> None:
    path = saved[0] / file
    path.unlink() if damage == "missing" else path.write_text("" if damage == "empty" else "x" * 500)
    with pytest.raises(InputError, match=file.replace(".", r"\.")):
        load_model(saved[0])


def test_a_module_of_ones_own_is_loaded_into_an_instance(tmp_path: Path) -> None:
    spec = toy_images().spec
    own, fresh = (nn.Sequential(nn.Flatten(), nn.Linear(432, 4)) for _ in range(2))
    save_model(tmp_path, own, None, spec)
    with pytest.raises(InputError, match="`into`"):
        load_model(tmp_path)
    loaded, _ = load_model(tmp_path, into=fresh)
    assert loaded is fresh and torch.equal(fresh[1].weight, own[1].weight)


def outcome(more: Part, less: Part, rest: Part, backdoor_class: int = 2) -> Outcome:
    """What a defense hands back whose main head disagrees with these (count, n) of the three parts of a class."""
    zeros = torch.zeros(80, dtype=torch.float64)
    names = ("suspicious_half", "other_half", "rest_of_class")
    parts = {
        f"disagree_in_{name}": {"count": count, "n": n}
        for name, (count, n) in zip(names, (more, less, rest), strict=True)
    }
    evidence = {"backdoor_class": backdoor_class, "flagged": 20, **parts}
    return Outcome(nn.Identity(), zeros, zeros, zeros > 0, zeros.long() - 1, evidence=evidence)


@pytest.mark.parametrize(
    ("more", "less", "rest", "poisoned"),
    [
        ((40, 40), (1, 40), (0, 40), True),  # concentrated where the suspicion is
        ((20, 23), (0, 23), (1, 30), True),
        ((38, 40), (38, 40), (2, 40), True),  # nearly all of those asked
        ((38, 40), (38, 40), (38, 40), False),  # but a class that is hard to tell is no evidence
        ((4, 40), (4, 40), (4, 40), False),
        ((1, 40), (10, 40), (1, 40), False),
        ((3, 40), (1, 40), (1, 40), False),  # more, but not surely more
        ((1, 1), (0, 1), (0, 1), False),
    ],
)
def test_verdict(more: Part, less: Part, rest: Part, poisoned: bool) -> None:
    verdict = decide(toy_images(80), outcome(more, less, rest))
    assert verdict.poisoned == poisoned and 0 <= verdict.confidence <= 0.99
    assert verdict.target_classes == (["class 2"] if poisoned else [])
    assert verdict.estimated_rate == (0.25 if poisoned else 0)
    assert f"{more[0]} of {more[1]}" in verdict.evidence[1] and json.dumps(verdict.as_json())


def test_clear_evidence_makes_sure() -> None:
    data = toy_images(80)
    sure = [decide(data, outcome((count, 40), (1, 40), (1, 40))).confidence for count in (12, 25, 40)]
    assert sure == sorted(sure) and sure[0] < sure[2]


def test_no_evidence_finds_nothing_and_says_so() -> None:
    zeros = torch.zeros(80, dtype=torch.float64)
    nothing = decide(toy_images(80), Outcome(nn.Identity(), zeros, zeros, zeros > 0, zeros.long() - 1))
    unclear = decide(toy_images(80), outcome((0, 0), (0, 0), (0, 0), backdoor_class=-1))
    few = [decide(toy_images(80), outcome(*parts)) for parts in permutations([(1, 1), (1, 1), (0, 0)])]
    for verdict in (nothing, unclear, *few):
        assert not verdict.poisoned and verdict.confidence == 0 and len(verdict.evidence) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_outcome_must_be_whole(bad: float) -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="not finite"):
        Outcome(nn.Identity(), zeros + bad, zeros, zeros > 0, zeros.long())
    with pytest.raises(RuntimeError, match="one value for each sample"):
        Outcome(nn.Identity(), zeros, zeros[:2], zeros > 0, zeros.long())
