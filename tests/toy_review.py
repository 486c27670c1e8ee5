"""A run folder as `train` leaves it, without training: enough to review."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from antibackdoor.data.core import Splits
from antibackdoor.files import write_csv


def toy_run_of(splits: Splits, folder: Path, flagged: int = 6) -> Path:
    """The first `flagged` samples are flagged, the later the less suspicious; each gets the next class suggested."""
    folder.mkdir(parents=True)
    data, n = splits.train, len(splits.train)
    names = np.array(data.spec.classes, dtype=object)
    given = data.y.numpy()
    bad = np.arange(n) < flagged
    table = pd.DataFrame(
        {
            "id": list(data.ids),
            "label": names[given],
            "score": np.linspace(1, 0, n),
            "probability": bad.astype(float),
            "flagged": bad,
            "suggested_label": np.where(bad, names[(given + 1) % len(names)], ""),
            "reason": np.where(bad, "learned early", ""),
        }
    )
    write_csv(folder / "suspects.csv", table)
    (folder / "config.json").write_text(json.dumps({"data": data.fingerprint()}))
    (folder / "source.json").write_text(json.dumps(dict(splits.source or {})))
    return folder
