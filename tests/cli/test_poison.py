"""`poison`: every kind of data comes back as the kind that it was, with its truth apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from antibackdoor.bench.poisoned import poison, read_experiment, write_poisoned
from antibackdoor.data.core import Data, Splits
from antibackdoor.data.load import load
from tiny import stored
from toy import toy_series
from toy_files import Run, write_images


def test_a_manifest_comes_back_as_a_manifest(run: Run, tmp_path: Path) -> None:
    root = write_images(tmp_path / "in" / "files", count=8)
    lines = [
        f"files/{path.relative_to(root)},{path.parent.name},{'test' if int(path.stem) > 5 else 'train'}"
        for path in sorted(root.rglob("*.png"))
    ]
    (tmp_path / "in" / "d.csv").write_text("path,label,split\n" + "\n".join(lines) + "\n", encoding="utf-8")
    out = tmp_path / "out"
    told = run(
        "poison", tmp_path / "in" / "d.csv", "--attack", "several", "--rate", 0.3, "--format", "folder", "--out", out
    )
    assert "PSNR" in told.output and "SSIM" in told.output
    assert (out / "data.csv").is_file() and len(list((out / "images").iterdir())) == 24 and not (out / "data").exists()
    original, again = load(tmp_path / "in" / "d.csv"), load(out)
    made = poison(original, "several", {"rate": 0.3})
    assert torch.equal(stored(again.train), stored(made.splits.train)) and torch.equal(
        again.train.y, made.splits.train.y
    )
    experiment = read_experiment(out, again)
    assert torch.equal(experiment.targets, made.experiment.targets)
    assert len(experiment.truth.targets.unique()) == 3
    assert torch.equal(experiment.truth.targets, made.experiment.truth.targets)
    assert json.loads((out / "attack.json").read_text())["stealth"]["psnr"]["n"] == 5


@pytest.mark.parametrize("unequal", [False, True])
def test_series_come_back_as_ts_files(tmp_path: Path, unequal: bool) -> None:
    train, test = (toy_series(40, classes=4, unequal=unequal, seed=seed) for seed in (0, 1))
    made = poison(Splits(train, test), "composite", {"rate": 0.2, "target": 3})
    write_poisoned(made, tmp_path / "out", form="folder")
    assert {path.name for path in (tmp_path / "out" / "data").iterdir()} == {"poisoned_TRAIN.ts", "poisoned_TEST.ts"}
    again = load(tmp_path / "out")
    assert again.test is not None

    def same(read: Data, given: Data) -> bool:
        steps = read.spec.shape[1]
        return torch.equal(stored(read), stored(given)[..., :steps]) and torch.equal(read.y, given.y)

    assert same(again.train, made.splits.train) and same(again.test, test)
    experiment = read_experiment(tmp_path / "out", again)
    assert same(experiment.triggered, made.experiment.triggered)
    assert torch.equal(experiment.truth.poisoned, made.experiment.truth.poisoned)


def test_names_never_lead_out_of_a_manifest_or_a_series_folder(tmp_path: Path) -> None:
    names = ["../../evil", "..", "A b:c", "a_b:c"]
    x, y = np.zeros((40, 8, 8, 3), np.uint8), np.arange(40) % 4
    ids = [f"/etc/{k}/../x" for k in range(40)]
    np.savez(tmp_path / "i.npz", x_train=x, y_train=y, x_test=x, y_test=y, classes=names, ids_train=ids, ids_test=ids)
    series = np.random.default_rng(0).normal(size=(40, 2, 9)).astype(np.float32)
    np.savez(tmp_path / "s.npz", x_train=series, y_train=y, x_test=series, y_test=y, classes=names)
    for number, (source, form) in enumerate((("i", "manifest"), ("s", "folder"))):
        out = tmp_path / "sub" / str(number)
        out.parent.mkdir(exist_ok=True)
        write_poisoned(poison(load(tmp_path / f"{source}.npz"), "badnets"), out, form=form)  # type: ignore[arg-type]
        read_experiment(out, load(out))
    assert {path.name for path in tmp_path.iterdir()} == {"i.npz", "s.npz", "sub"}
    assert {path.name for path in (tmp_path / "sub").iterdir()} == {"0", "1"}
