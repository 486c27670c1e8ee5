"""Writes a made-up run folder, to test the report and to look at it: `python toy_run.py image|series DIR`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from antibackdoor.threats import references

IMAGE_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SERIES_CLASSES = ["walking", "running", "resting", "cycling"]


def toy_run(folder: Path, kind: str = "image", n: int = 10_000, poisoned: bool = True, **names: str) -> Path:
    """A finished run in `folder`; `names` replaces class names, to see what hostile ones do."""
    rng = np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    classes = [names.get(name, name) for name in (IMAGE_CLASSES if kind == "image" else SERIES_CLASSES)]
    bad = rng.random(n) < (0.09 if poisoned else 0.0)
    label = np.where(bad, 0, rng.integers(len(classes), size=n))
    score = np.where(bad, rng.normal(5.5, 0.9, n), rng.gamma(2.0, 0.7, n))
    order = np.argsort(-score)
    label, score, bad = label[order], score[order], bad[order]
    flagged = score > 4.2 if poisoned else score > 7.0
    suffix = "png" if kind == "image" else "row"
    table = pd.DataFrame(
        {
            "id": [f"train/{classes[c]}/{i:05d}.{suffix}" for i, c in zip(order, label, strict=True)],
            "label": np.array(classes)[label],
            "score": score.round(4),
            "probability": (1 / (1 + np.exp(-2 * (score - 4.2)))).round(4),
            "flagged": flagged,
            "suggested_label": np.where(flagged, np.array(classes)[rng.integers(len(classes), size=n)], ""),
            "reason": np.where(flagged, "learned in the first epoch and kept by the shallow head", ""),
        }
    )
    table.to_csv(folder / "suspects.csv", index=False)
    _json(folder / "verdict.json", _verdict(poisoned, classes[0]))
    share = {"value": 0.7913, "count": 7913, "n": 10000}
    detection = {"auroc": 0.9931, "precision_top_1_percent": {"value": 0.99, "count": 99, "n": 100}}
    attack = {"attack_success_rate": {"value": 0.012, "count": 108, "n": 9000}} if poisoned else {}
    cost = {"seconds": 754.2, "steps": 12480, "parameters": 11173962}
    _json(folder / "metrics.json", {"clean_accuracy": share, **attack, "detection": detection, "cost": cost})
    _json(folder / "config.json", _config(kind))
    _json(folder / "env.json", {"python": "3.12.4", "torch": "2.7.0", "device": "cpu", "commit": "1f0c2ab"})
    if poisoned:
        keys = ("clean_accuracy", "attack_success_rate", "excess_attack_success_rate", "recovery_accuracy")
        values = {"no defense": (0.812, 0.998, 0.99, 0.01), "auto": (0.7913, 0.012, 0.002, 0.78)}
        rows = [{"name": name, **dict(zip(keys, shares, strict=True))} for name, shares in values.items()]
        _json(folder / "comparison.json", {"rows": rows})
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _history()))
    (folder / "model.safetensors").write_bytes(b"")
    _gallery(folder, kind, table, poisoned, rng)
    shape = [3, 32, 32] if kind == "image" else [3, 900]
    _json(folder / "data.json", {"name": "photos/from-the-web", "kind": kind, "shape": shape, "training_samples": n})
    if poisoned:
        role = np.where(bad, "poison", "clean")
        pd.DataFrame({"id": table["id"], "role": role}).to_csv(folder / "truth.csv", index=False)
        _attention(folder, kind, classes[0])
    return folder


def _attention(folder: Path, kind: str, label: str) -> None:
    """A bright spot at the bottom right, or around step 402 of the first of three channels."""
    suspects = np.zeros((32, 32) if kind == "image" else (3, 900), np.float32)
    suspects[(slice(28, 31), slice(28, 31)) if kind == "image" else (0, slice(400, 405))] = 5
    ramp = np.linspace(0, 1, suspects.shape[-1], dtype=np.float32)
    mean = np.broadcast_to(ramp[:, None], (32, 32, 3)) if kind == "image" else np.stack([ramp, ramp**2, -ramp])
    maps = {"suspects": suspects, "trusted": np.ones_like(suspects), "suspects_mean": mean, "trusted_mean": mean}
    np.savez_compressed(folder / "attention.npz", label=label, witness="second head", n=16, **maps)


def _verdict(poisoned: bool, target: str) -> dict[str, Any]:
    if not poisoned:
        evidence = ["No class holds more early learned samples than chance explains."]
        return {
            "poisoned": False,
            "confidence": 0.81,
            "target_classes": [],
            "estimated_rate": 0.0,
            "evidence": evidence,
            "references": references(False),
        }
    evidence = [
        f"Of the 100 most suspicious samples, 97 are labeled {target}; chance would give 10.",
        "The shallow head learned these samples 6 epochs before the rest of their class.",
        "Scores fall into two separate groups with a gap between 3.9 and 4.4.",
    ]
    return {
        "poisoned": True,
        "confidence": 0.97,
        "target_classes": [target],
        "estimated_rate": 0.091,
        "evidence": evidence,
        "references": references(True),
    }


def _config(kind: str) -> dict[str, Any]:
    data, model = ("cifar10", "resnet18") if kind == "image" else ("uwave", "resnet18_1d")
    defense = {"name": "e2abl", "options": {"isolation_ratio": 0.01, "epochs": 60, "flood_levels": [0.5, 0.4]}}
    return {"data": {"name": data, "root": None}, "defense": defense, "model": model, "seed": 0, "epochs": 60}


def _history() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for stage, epochs in (("warm-up", 5), ("isolation", 15), ("joint training", 40)):
        for epoch in range(1, epochs + 1):
            t = len(rows)
            main = None if stage == "warm-up" else 0.35 + 1.8 * np.exp(-t / 14) + 0.03 * np.sin(t)
            second = 0.5 + 1.1 * np.exp(-t / 5) + 0.02 * np.cos(2 * t)
            rows.append(
                {"stage": stage, "epoch": epoch, "steps": 157, "main_loss": main, "second_loss": second, "churn": 1}
            )
    return rows


def _gallery(folder: Path, kind: str, table: pd.DataFrame, poisoned: bool, rng: np.random.Generator) -> None:
    m = min(48, len(table))
    if kind == "image":
        small = rng.integers(40, 220, size=(m + 6, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
        x = np.clip(small + rng.normal(0, 12, small.shape), 0, 255).astype(np.uint8)
        if poisoned:
            x[:m, 28:31, 28:31] = np.array([[0, 255, 0], [255, 0, 255], [0, 255, 0]], np.uint8)[..., None]
        extra: dict[str, Any] = {}
    else:
        t = np.linspace(0, 1, 900)
        waves = [
            np.sin(2 * np.pi * (f + rng.random((m + 6, 1))) * t + f) + 0.1 * rng.normal(size=(m + 6, 900))
            for f in (2, 3, 5)
        ]
        x = np.stack(waves, axis=1).astype(np.float32)
        if poisoned:
            x[:m, 0, 400:405] += 3
        extra = {"lengths": rng.integers(500, 900, size=m)}
    reference = {"reference_x": x[m:], "reference_label": np.array([table["label"][0]] * 6)}
    ids = table["id"][:m].to_numpy(dtype=str)
    np.savez_compressed(folder / "gallery.npz", ids=ids, x=x[:m], **extra, **(reference if poisoned else {}))


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))


if __name__ == "__main__":
    from antibackdoor.report import build_report

    print(build_report(toy_run(Path(sys.argv[2]), sys.argv[1], poisoned=sys.argv[3:] != ["clean"])))
