"""Experiment trackers: what the training loop tells, sent on to TensorBoard, MLflow or Weights & Biases.

The loggers are Fabric's own and those of PyTorch Lightning, which have the same surface. `history.csv` in the run
folder needs none of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from antibackdoor.errors import InputError, unknown
from antibackdoor.files import read_object, write_json
from antibackdoor.training.loop import Progress

TRACKERS = ("tensorboard", "mlflow", "wandb")
PROJECT = "antibackdoor"


def check_trackers(names: Sequence[str], folder: str | Path | None) -> None:
    """Refuse names that are no trackers, and trackers without a run folder."""
    wrong = [name for name in names if name not in TRACKERS]
    if wrong:
        raise unknown("tracker", wrong[0], TRACKERS)
    if names and folder is None:
        raise InputError("tracking needs a run folder; give `out`.")


class Tracking:
    """The loggers of one run. A resumed run goes on in the same experiment: its id is kept in `tracking.json`."""

    def __init__(self, names: Sequence[str], folder: Path | None):
        self.folder = folder or Path()
        path = self.folder / "tracking.json"
        self.ids: dict[str, str] = read_object(path) if names and path.is_file() else {}
        self.loggers = {name: self._make(name) for name in dict.fromkeys(names)}

    def begin(self, settings: dict[str, Any]) -> None:
        """Tell the settings, and keep the ids."""
        for name, logger in self.loggers.items():
            logger.log_hyperparams(settings)
            if name == "mlflow":
                self.ids[name] = str(logger.run_id)
            elif name == "wandb":
                self.ids[name] = str(logger.experiment.id)
        if self.loggers:
            write_json(self.folder / "tracking.json", self.ids)

    def watch(self, progress: Progress | None) -> Progress:
        """`progress`, and every epoch's numbers to the loggers as STAGE/NAME."""
        progress = progress or Progress()
        if not self.loggers:
            return progress
        told = progress.epoch

        def epoch(row: dict[str, Any]) -> None:
            told(row)
            numbers = {f"{row['stage']}/{key}": value for key, value in row.items() if _is_number(value)}
            self._log(numbers, int(row["steps"]))

        return replace(progress, epoch=epoch)

    def end(self, metrics: dict[str, Any]) -> None:
        """The measures of the finished run, shares by their values."""
        if not self.loggers:
            return
        bare = {key: value.get("value") if isinstance(value, dict) else value for key, value in metrics.items()}
        numbers = {key: float(value) for key, value in bare.items() if _is_number(value)}
        self._log(numbers, None)
        for name, logger in self.loggers.items():
            logger.finalize("success")
            if name == "wandb":  # its logger leaves the run open, and the next one would be told to it
                logger.experiment.finish()

    def _log(self, numbers: dict[str, float], step: int | None) -> None:
        for logger in self.loggers.values():
            logger.log_metrics(numbers, step=step)

    def _make(self, name: str) -> Any:
        """A logger; nothing leaves this machine unless the tracker's own settings say so."""
        try:
            if name == "tensorboard":
                from lightning_fabric.loggers.tensorboard import TensorBoardLogger

                return TensorBoardLogger(self.folder, name="tensorboard", version="")
            if name == "mlflow":
                from pytorch_lightning.loggers import MLFlowLogger

                address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(self.folder / 'mlflow.db').resolve()}"
                return MLFlowLogger(PROJECT, self.folder.resolve().name, address, run_id=self.ids.get(name))
            from pytorch_lightning.loggers import WandbLogger

            offline = os.environ.get("WANDB_MODE", "offline") == "offline"
            return WandbLogger(save_dir=self.folder, project=PROJECT, id=self.ids.get(name), offline=offline)
        except ImportError:
            raise InputError(f"tracking with {name} needs more packages: pip install 'antibackdoor[{name}]'.") from None


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
