"""What every defense promises, on images and series; and what E2ABL promises of each of its options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch

from antibackdoor.attacks import ATTACKS
from antibackdoor.bench.cell import subset
from antibackdoor.bench.judge import attack_measures, detection_measures
from antibackdoor.data.core import Data
from antibackdoor.data.load import load
from antibackdoor.data.rows import FileRows
from antibackdoor.defenses import DEFENSES, Outcome
from antibackdoor.defenses.e2abl import E2ABL
from antibackdoor.models import create
from antibackdoor.models.tap import Tap
from antibackdoor.seeds import generator
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Progress
from antibackdoor.verdict import decide
from tiny import FABRIC, same_weights, short, stored, train
from toy import toy_images, toy_series

SETS = {"image": toy_images, "series": toy_series, "unequal series": lambda **o: toy_series(unequal=True, **o)}
NAMES = [entry.name for entry in DEFENSES] + ["e2abl:paper"]
EPOCHS = {"none": 5, "dlp": 5, "e2abl": 5, "e2abl:paper": 5}
"""Of each stage; 2 where not said, enough to cut a run within each of them."""


@dataclass(frozen=True)
class Case:
    """One finished run, shared by the tests of this module."""

    name: str
    data: Data
    before: str
    folder: Path
    outcome: Outcome
    job: Job


def restless(data: Data) -> Data:
    """The set with every third label drawn anew, so that what a model says of a sample changes from epoch to epoch."""
    wrong = torch.randint(len(data.spec.classes), data.y.shape, generator=generator(0, "wrong labels"))
    return replace(data, y=torch.where(torch.arange(len(data)) % 3 == 0, wrong, data.y))


def run(data: Data, name: str, **others: Any) -> tuple[Outcome, Job]:
    """A run of every stage for its number of epochs."""
    return train(data, name, short(name, EPOCHS.get(name, 2)), **others)


@pytest.fixture(scope="module", params=[(name, kind) for name in NAMES for kind in ("image", "series")], ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, kind = request.param
    data, folder = restless(SETS[kind](n=48)), tmp_path_factory.mktemp("run")
    before = data.fingerprint()
    return Case(name, data, before, folder, *run(data, name, folder=folder))


def curve(job: Job) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in job.history]


def assert_same(case: Case, outcome: Outcome, job: Job) -> None:
    assert same_weights(case.outcome.model, outcome.model)
    for field in ("scores", "probability", "flagged", "suggested"):
        assert torch.equal(getattr(case.outcome, field), getattr(outcome, field)), field
    assert case.outcome.evidence == outcome.evidence and case.outcome.reasons == outcome.reasons
    assert curve(case.job) == curve(job)
    assert len(case.outcome.partitions) == len(outcome.partitions)
    for one, two in zip(case.outcome.partitions, outcome.partitions, strict=True):
        assert all(torch.equal(getattr(one, f), getattr(two, f)) for f in ("isolated", "recovered", "labels"))


def test_outcome_has_one_value_for_every_sample(case: Case) -> None:
    out, n = case.outcome, len(case.data)
    assert out.scores.shape == out.probability.shape == out.flagged.shape == out.suggested.shape == (n,)
    assert out.scores.dtype == torch.float64 and out.flagged.dtype == torch.bool and out.suggested.dtype == torch.int64
    assert out.scores.isfinite().all()
    assert out.probability.min() >= 0 and out.probability.max() <= 1
    assert (out.suggested[~out.flagged] == -1).all()
    assert ((out.suggested != case.data.y) & (out.suggested >= 0))[out.flagged].all()
    assert set(out.reasons) == set(out.flagged.nonzero().flatten().tolist())


def test_data_is_not_modified(case: Case) -> None:
    assert case.data.fingerprint() == case.before


def test_history_has_one_row_an_epoch_and_stage(case: Case) -> None:
    places = [(row["stage"], row["epoch"]) for row in case.job.history]
    stages = list(dict.fromkeys(stage for stage, _ in places))
    assert places == [(stage, epoch) for stage in stages for epoch in range(1, EPOCHS.get(case.name, 2) + 1)]


def test_same_seed_same_result(case: Case) -> None:
    torch.seed()
    assert_same(case, *run(case.data, case.name))
    assert not same_weights(case.outcome.model, run(case.data, case.name, seed=1)[0].model)


def test_rows_on_disk_give_the_same_weights(case: Case, tmp_path: Path) -> None:
    array = np.moveaxis(stored(case.data).numpy(), 1, -1)
    array.tofile(tmp_path / "x.bin")
    order = (0, array.ndim - 1, *range(1, array.ndim - 1))
    from_disk = replace(case.data, x=FileRows(tmp_path / "x.bin", array.shape, array.dtype, order))
    assert from_disk.fingerprint() == case.before
    assert_same(case, *run(from_disk, case.name))


def test_a_run_cut_after_every_epoch_ends_with_the_same_result(case: Case, tmp_path: Path) -> None:
    def attempt() -> tuple[Outcome, Job] | None:
        seen = []

        def cut(row: dict[str, Any]) -> None:
            seen.append(row)
            if len(seen) == 2:  # the first is saved, the second is lost
                raise KeyboardInterrupt

        torch.seed()
        try:
            return run(case.data, case.name, folder=tmp_path, progress=Progress(epoch=cut))
        except KeyboardInterrupt:
            return None

    attempts = [attempt() for _ in case.job.history]
    assert attempts[-1] is not None and attempts[:-1] == [None] * (len(attempts) - 1)
    assert_same(case, *attempts[-1])


def test_a_finished_run_trains_nothing(case: Case) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a finished stage was trained again")

    torch.seed()
    assert_same(case, *run(case.data, case.name, folder=case.folder, progress=Progress(step=refuse, epoch=refuse)))


def test_model_is_the_plain_backbone(case: Case) -> None:
    model = case.outcome.model
    assert model.state_dict().keys() == create("resnet18-w8", case.data.spec).state_dict().keys()
    for module in model.modules():
        assert not isinstance(module, Tap)
        assert not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
    x = case.data.spec.decode(case.data.x[torch.arange(3)])
    assert model.eval()(x).shape == (3, len(case.data.spec.classes))


@pytest.mark.parametrize("name", NAMES)
def test_series_of_unequal_length(name: str) -> None:
    outcome, _ = train(SETS["unequal series"](n=32), name, short(name, 1))
    assert outcome.scores.isfinite().all()


@dataclass(frozen=True)
class Duel:
    """What the judge says of plain training and of E2ABL on the same set, one tenth of it with a BadNets patch."""

    data: Data
    outcome: Outcome
    plain: dict[str, Any]
    defended: dict[str, Any]
    detection: dict[str, Any]


def digits(n: int, seed: int) -> Data:
    """Handwritten digits that come with scikit-learn: unlike the toy images not learned before any trigger."""
    splits = load("digits")
    assert splits.test is not None
    return subset((splits.train, splits.test)[seed], n)


DUELS = {"image": digits, "series": lambda n, seed: toy_series(n // 2, classes=4, seed=seed)}


@pytest.fixture(scope="module", params=DUELS)
def duel(request: pytest.FixtureRequest) -> Duel:
    clean, test = (DUELS[request.param](n=400, seed=seed) for seed in (0, 1))
    attack = ATTACKS["badnets"].make(target=1, rate=0.1, share=0.1)
    state = attack.fit(clean)
    data, truth = attack.poison(clean, state, 0)
    plain, _ = train(data, "none", {**short("none", 6), "recipe.augment": "none"})
    outcome, _ = train(data, "e2abl", {**short("e2abl", 8), "main.augment": "none"})
    triggered, targets = attack.triggered(test, state)
    one, two = (attack_measures(o.model, test, triggered, targets, FABRIC) for o in (plain, outcome))
    return Duel(data, outcome, one, two, detection_measures(outcome, truth))


def test_e2abl_beats_no_defense(duel: Duel) -> None:
    name = "attack_success_rate"
    assert duel.plain[name]["value"] > 0.9
    assert duel.defended[name]["value"] <= duel.plain[name]["value"] / 2
    assert duel.defended["clean_accuracy"]["value"] > 0.9


def test_e2abl_finds_the_poison_and_says_so(duel: Duel) -> None:
    verdict = decide(duel.data, duel.outcome)
    assert duel.detection["auroc"]["value"] > 0.9
    assert verdict.poisoned and verdict.target_classes == [duel.data.spec.classes[1]]


def choices(name: str) -> list[Any]:
    """The values of a field that is yes or no, or a closed list."""
    kind = E2ABL.__pydantic_fields__[name].annotation  # type: ignore[attr-defined]
    return [True, False] if kind is bool else list(get_args(kind)) if get_origin(kind) is Literal else []


def alternatives() -> list[dict[str, Any]]:
    """Every value of a closed list that is not the default, the ends of the ranges, and some combinations."""
    names = [field.name for field in dataclasses.fields(E2ABL)]  # type: ignore[arg-type]
    ends = [{rate: end} for rate in ("window", "predominance", "recovery_delay", "probation") for end in (0, 1)]
    return [
        *({name: value} for name in names for value in choices(name) if value != getattr(E2ABL(), name)),
        *ends,
        {"isolation_rate": 1e-9},
        {"isolation_rate": 1},
        {"recovery_rate": 0},
        {"recovery_rate": 1},
        {"attach": "layer1"},
        {"attach": "layer3.0"},
        {"warm_up": "null"},
        {"warm_up": None, "refresh": "epoch", "ranking": "loss_drop"},
        {"second": "model", "stem_gradient": "detached"},
        {"remainder": "recover", "recover_only_backdoor_label": False, "predominance": 0},
        {"control": "unlearn", "predominance": 0, "recover_only_backdoor_label": False},
    ]


@pytest.mark.parametrize("kind", ["image", "series"])
@pytest.mark.parametrize("options", alternatives(), ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
def test_e2abl_runs_with_each_option(options: dict[str, Any], kind: str) -> None:
    fast = {"warm_up.epochs": 1, "warm_up.min_steps": 0, "main.epochs": 2, "main.min_steps": 0}
    fast = {name: value for name, value in fast.items() if name.split(".")[0] not in options}
    outcome, job = train(SETS[kind](n=32), "e2abl", {**fast, **options})
    assert outcome.scores.isfinite().all() and len(outcome.partitions) == 3
    assert all(np.isfinite(row["main_loss"]) for row in job.history[-2:])
