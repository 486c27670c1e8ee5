"""Clean samples for the defenses that need some: who gets them, where they come from, and that tables tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import antibackdoor
from antibackdoor.bench import cell as benchmark
from antibackdoor.bench.cell import Cell, carve, run_cell
from antibackdoor.bench.tables import table
from antibackdoor.cli import app
from antibackdoor.data.arrays import write_npz
from antibackdoor.data.core import Data, Splits
from antibackdoor.defenses import DEFENSES, Defense, Outcome, check_given, make_defense
from antibackdoor.defenses.none import without_suspects
from antibackdoor.errors import InputError
from antibackdoor.options import options
from antibackdoor.training.job import Job
from antibackdoor.verdict import decide
from tiny import FABRIC, short, train
from toy import toy_images, toy_series

FAST = (("epochs", 1), ("min_steps", 0))
NEEDY = sorted(entry.name for entry in DEFENSES if "clean" in entry.make.needs)


def test_who_needs_clean_samples() -> None:
    assert NEEDY == ["anp", "fine_pruning", "mcr", "nad"]


def test_carving_takes_a_share_of_every_class_and_leaves_some() -> None:
    data = toy_series(100, classes=4)
    data = replace(
        data, y=torch.cat([torch.zeros(60), torch.ones(37), torch.full((2,), 2), torch.full((1,), 3)]).long()
    )
    rest, clean = carve(data, 0.05, 0)
    assert torch.bincount(clean.y, minlength=4).tolist() == [3, 2, 1, 0]
    assert sorted([*rest.ids, *clean.ids]) == sorted(data.ids) and not set(rest.ids) & set(clean.ids)
    assert carve(data, 0.05, 0)[1].ids == clean.ids != carve(data, 0.05, 1)[1].ids
    with pytest.raises(InputError, match="none can be set aside"):
        carve(data.take(torch.tensor([0, 99])), 0.05, 0)


@options
class Spy(Defense):
    """Keeps what it was given."""

    needs = frozenset({"clean"})

    def run(self, job: Job) -> Outcome:
        """Train nothing."""
        SEEN.append((job.data, job.extras))
        return without_suspects(job.model(), len(job.data))


SEEN: list[tuple[Data, dict[str, Data]]] = []


def test_a_cell_carves_from_the_training_set_before_it_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "make_defense", lambda name, settings=None: Spy())
    settings: dict[str, Any] = {"data": "digits", "train_size": 200, "attack": "badnets", "model": "resnet18-w4"}
    record = run_cell(Cell(**settings, attack_options={"rate": 0.5}, defense="spy", clean_share=0.1), device="cpu")
    data, extras = SEEN.pop()
    splits = antibackdoor.load("digits")
    assert splits.test is not None and set(extras) == {"clean"}
    clean, original = extras["clean"], {name: row for row, name in enumerate(splits.train.ids)}
    rows = torch.tensor([original[name] for name in clean.ids])  # of the training set, never of the test set
    assert torch.equal(clean.x[torch.arange(len(clean))], splits.train.x[rows])  # no trigger
    assert torch.equal(clean.y, splits.train.y[rows])  # no flipped label
    assert not set(clean.ids) & set(data.ids) and len(clean) + len(data) == 200
    assert record["measures"]["poisoned_samples"]["n"] == len(data)
    assert record["cell"]["clean_share"] == 0.1


def test_no_defense_is_given_more_than_it_declares() -> None:
    """A defender sees samples, labels, and nothing that knows which of them are poisoned."""
    assert set(vars(toy_series(4))) == {"x", "y", "spec", "ids", "lengths"}
    for name in (entry.name for entry in DEFENSES):
        assert make_defense(name).needs <= {"clean"}  # no rate, no target, no test set


@pytest.mark.parametrize("name", NEEDY)
def test_without_clean_samples_it_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"'{name}' needs clean samples .* --clean PATH"):
        antibackdoor.train(toy_images(20), defense=name, model="resnet18-w4", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="give some with --clean"):
        train(toy_images(20), name, extras={}, model="resnet18-w4")


def test_clean_samples_that_would_not_be_used_are_refused() -> None:
    with pytest.raises(InputError, match="'abl' uses no clean samples"):
        antibackdoor.train(toy_images(20), defense="abl", clean=toy_images(8))
    check_given("abl", make_defense("abl"), {})


@pytest.mark.parametrize(
    ("clean", "message"),
    [
        (toy_images(8, size=8), "shape"),
        (toy_series(8), "shape"),
        (toy_images(8, classes=3), "same classes"),
        (toy_images(8).take(torch.arange(0)), "no samples"),
    ],
)
def test_clean_samples_must_fit(clean: Data, message: str) -> None:
    with pytest.raises(InputError, match=message):
        antibackdoor.train(toy_images(20), defense="nad", clean=clean, model="resnet18-w4")


def test_train_with_clean_samples(tmp_path: Path) -> None:
    data, clean = toy_images(24), toy_images(12, seed=1)
    settings: dict[str, Any] = {"defense": "fine_pruning", "options": short("fine_pruning", 1), "model": "resnet18-w4"}
    result = antibackdoor.train(
        data, clean=Splits(clean, toy_images(8)), out=tmp_path / "run", device="cpu", **settings
    )
    assert not result.verdict.poisoned and "no verdict" in result.verdict.evidence[0]
    with pytest.raises(InputError, match="other data or settings"):  # resumed with another clean set
        antibackdoor.train(data, clean=toy_images(12, seed=2), out=tmp_path / "run", resume=True, **settings)


def test_verdict_of_methods_that_isolate_a_fixed_share() -> None:
    outcome, _ = train(toy_series(24), "abl", short("abl", 1), model="resnet18-w4")
    verdict = decide(toy_series(24), outcome)
    assert not verdict.poisoned and verdict.confidence == 0 and "fixed share" in verdict.evidence[0]


def test_names_and_tables_tell_who_had_clean_samples() -> None:
    assert Cell(defense="nad").resolved()["clean_share"] == 0.05
    assert (
        Cell(defense="nad").name()
        == Cell(defense="nad", clean_share=0.05).name()
        != Cell(defense="nad", clean_share=0.1).name()
    )
    assert (
        Cell(defense="none", clean_share=0.1).name() == Cell(defense="none").name()
    )  # results made before have theirs
    measures = {"clean_accuracy": {"value": 0.9}, "attack_success_rate": {"value": 0.1}}
    cells = [{"cell": Cell(defense=name).resolved(), "measures": measures} for name in ("nad", "abl")]
    assert table(cells)["defense"].tolist() == ["abl", "nad + 5% clean"]


def test_clean_samples_go_to_the_device_with_the_job() -> None:
    job = Job(toy_series(4), extras={"clean": toy_series(6), "rate": 0.1}, fabric=FABRIC)
    assert len(job.clean) == 6 and job.extras["rate"] == 0.1


def test_command_line(tmp_path: Path) -> None:
    for name, seed in (("data", 0), ("clean", 1)):
        write_npz(tmp_path / f"{name}.npz", Splits(toy_images(24, seed=seed)))
    settings = [f"{stage}.{name}={value}" for stage in ("training", "masking") for name, value in FAST]
    words = ["train", tmp_path / "data.npz", "--defense", "anp", "--model", "resnet18-w4", "--out", tmp_path / "run"]
    words += [word for setting in settings for word in ("--set", setting)]
    refused = CliRunner().invoke(app, [str(word) for word in words])
    assert refused.exit_code == 2 and "--clean PATH" in refused.output and "Traceback" not in refused.output
    done = CliRunner().invoke(app, [str(word) for word in [*words, "--clean", tmp_path / "clean.npz"]])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "result.json").exists()
