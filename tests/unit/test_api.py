"""The Python surface, where the command line's tests do not go."""

from pathlib import Path

import pytest
import torch

import antibackdoor
from antibackdoor.attacks import ATTACKS
from antibackdoor.bench.judge import Experiment
from antibackdoor.data.batches import gather
from antibackdoor.data.core import Splits
from antibackdoor.defenses.e2abl import E2ABL
from antibackdoor.defenses.trap import Trap
from antibackdoor.models.tap import Tap
from antibackdoor.training.job import Job
from antibackdoor.training.ranking import LossDrop
from tiny import FABRIC
from toy import toy_images

FAST = {"warm_up.epochs": 1, "warm_up.min_steps": 0, "main.min_steps": 0}


def test_metrics_are_written_when_nothing_is_flagged(tmp_path: Path) -> None:
    """Shares of nothing have no value; a run judged against the truth must end all the same."""
    clean, test = toy_images(60), toy_images(60, seed=1)
    attack = ATTACKS["badnets"].make()
    data, truth = attack.poison(clean, {}, 0)
    result = antibackdoor.train(
        Splits(data, test),
        defense="e2abl",
        options={**FAST, "control": "nothing"},
        model="resnet18-w8",
        epochs=1,
        device="cpu",
        out=tmp_path / "run",
        experiment=Experiment(truth, *attack.triggered(test, {})),
    )
    assert not result.suspects["flagged"].any()
    assert result.metrics["detection"]["flagged_precision"] == {"value": None, "count": 0, "n": 0}
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("mixing", [True, False])
def test_the_loss_drop_has_one_history(mixing: bool) -> None:
    job = Job(toy_images(60), model="resnet18-w8", fabric=FABRIC)
    options = E2ABL(ranking="loss_drop", mixing=mixing)
    trap = Trap(options, job)
    tap = Tap(job.model(), None, 4, gather(job.data, torch.arange(2), FABRIC.device).x)
    trap.look(tap, 0)
    assert isinstance(trap.ranking, LossDrop) and trap.ranking.seen == 1
