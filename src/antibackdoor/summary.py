"""What the command line tells after a run, and the table that `predict` writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.markup import escape

from antibackdoor.data.batches import steps_per_epoch
from antibackdoor.data.core import Splits
from antibackdoor.data.load import load_samples
from antibackdoor.data.series import Missing
from antibackdoor.defenses import AUTO as DEFENSE
from antibackdoor.defenses import Defense
from antibackdoor.detectors import AUTO as DETECTOR
from antibackdoor.detectors import Detector
from antibackdoor.findings import Findings, Result
from antibackdoor.models import resolve
from antibackdoor.report.words import percent, plain
from antibackdoor.runs import load_model
from antibackdoor.training.job import make_fabric
from antibackdoor.training.loop import Recipe
from antibackdoor.training.scores import logits_of

if TYPE_CHECKING:
    from rich.console import Console

MEASURES = {
    "clean_accuracy": "clean accuracy",
    "attack_success_rate": "attack success rate",
    "excess_attack_success_rate": "excess attack success rate",
    "recovery_accuracy": "recovery accuracy",
}


def print_summary(console: Console, result: Findings, folder: Path) -> None:
    """The verdict in words, what was flagged, what is known of the accuracy, and where the report lies."""
    verdict, flagged, n = result.verdict, int(result.suspects["flagged"].sum()), len(result.suspects)
    if verdict.poisoned:
        classes = ", ".join(repr(plain(name, 60)) for name in verdict.target_classes)
        word = "class" if len(verdict.target_classes) == 1 else "classes"
        head = f"[bold red]This data looks poisoned[/], towards the {word} {escape(classes)}"
    else:
        head = "[bold green]No poison was found[/]"
    if verdict.confidence:
        console.print(f"{head} (confidence {percent(verdict.confidence)}).", soft_wrap=True)
    else:
        console.print("[bold yellow]Whether there is poison was not judged[/]:", soft_wrap=True)
    for sentence in verdict.evidence:
        console.print(f"  {escape(plain(sentence))}", soft_wrap=True)
    console.print(f"{flagged:,} of {n:,} samples are flagged in suspects.csv.")
    for key, name in MEASURES.items():
        if key in result.metrics:
            console.print(f"{name}: {percent(result.metrics[key]['value'])}")
    console.print(f"Report: {escape(str(folder / 'report.html'))}", soft_wrap=True)


def summary(result: Findings, folder: Path) -> dict[str, Any]:
    """What `--json` prints: verdict, counts, measures, the first suspects, and where the files lie."""
    flagged = result.suspects[result.suspects["flagged"]]
    return {
        **result.verdict.as_json(),
        "samples": len(result.suspects),
        "flagged": len(flagged),
        "first_suspects": flagged["id"].head(20).tolist(),
        "metrics": result.metrics,
        **({"architecture": result.architecture} if isinstance(result, Result) else {}),
        "out": str(folder),
        "report": str(folder / "report.html"),
    }


def flagged_rows(result: Findings) -> list[dict[str, Any]]:
    """All flagged samples, most suspicious first."""
    flagged = result.suspects[result.suspects["flagged"]]
    rows = flagged[["id", "label", "score", "suggested_label", "reason"]].to_dict("records")
    return [{str(key): value for key, value in row.items()} for row in rows]


def print_plan(
    console: Console,
    splits: Splits,
    name: str,
    method: Defense | Detector,
    model: str,
    epochs: int | None,
    *,
    every: bool = False,
) -> None:
    """What is about to be run, with what "auto" and the size of the set make of it; every: all hyper-parameters too."""
    data, test = splits.train, splits.test
    held = "no test set" if test is None else f"{len(test):,} test samples"
    shape, classes = " x ".join(map(str, data.spec.shape)), len(data.spec.classes)
    console.print(
        f"data: {escape(splits.name)}, {len(data):,} samples ({data.spec.kind}, {shape}, {classes} classes), {held}",
        soft_wrap=True,
    )
    sort, chosen = ("defense", DEFENSE) if isinstance(method, Defense) else ("detector", DETECTOR)
    name, budget = chosen if name == "auto" else name, ""
    field = "main" if hasattr(method, "main") else "recipe"
    recipe = getattr(method, field, None)
    if isinstance(recipe, Recipe):
        recipe = recipe if epochs is None else replace(recipe, epochs=epochs)
        batch, passes = recipe.batch_for(len(data)), recipe.epochs_for(len(data)) * recipe.passes_for(len(data))
        budget = f"; main training {passes * steps_per_epoch(len(data), batch):,} steps of {batch} samples"
        if epochs is not None and passes > epochs:
            budget += f" ({passes} epochs: so small a set gets more, unless --set {field}.min_steps=0)"
    console.print(f"{sort}: {escape(name)} with {escape(resolve(model, data.spec))}{budget}", soft_wrap=True)
    if every:
        console.print(escape(repr(method)), soft_wrap=True)


def predict_table(
    folder: Path, data: str, *, device: str, missing: Missing, skip_unreadable: bool, data_root: Path | None
) -> pd.DataFrame:
    """id, predicted class, its probability and, where the data has labels, the label."""
    model, spec = load_model(folder)
    fabric = make_fabric(device, "32-true")
    samples, labels = load_samples(data, spec, missing=missing, skip_unreadable=skip_unreadable, data_root=data_root)
    probabilities = logits_of(model.to(fabric.device), samples, fabric).softmax(1)
    best = probabilities.max(1)
    table: dict[str, Any] = {
        "id": list(samples.ids),
        "predicted": [spec.classes[k] for k in best.indices.tolist()],
        "probability": best.values.numpy().round(6),
    }
    return pd.DataFrame(table if labels is None else {**table, "label": labels})
