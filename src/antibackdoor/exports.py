"""A finished run for other programs: suspects as a table, the model as ONNX."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from antibackdoor.data.core import Spec
from antibackdoor.errors import InputError, require
from antibackdoor.files import atomically, check_replaceable, write_csv
from antibackdoor.runs import issues_table, load_model, read_suspects

Table: TypeAlias = Literal["suspects", "issues"]
ENDINGS = (".csv", ".parquet", ".onnx")
TOLERANCE = 1e-3
"""How far ONNX Runtime's logits may be from PyTorch's, relative to their size; other kernels round differently."""


def export_run(folder: Path, out: Path, table: Table = "suspects") -> str:
    """Write `out` from a run folder, by its ending: .csv or .parquet (suspects, or issues as cleanlab has them), .onnx.

    Returns what was written, in words. Raises InputError for other endings, a file that is there already, unfinished
    runs and missing packages.
    """
    ending = out.suffix.lower()
    if ending not in ENDINGS:
        raise InputError(f"{out} should end in one of {', '.join(ENDINGS)}.")
    check_replaceable(out, ["id", "label"] if table == "suspects" else ["id", "is_backdoor_issue"])
    if ending == ".onnx":
        model, spec = load_model(folder)
        out.parent.mkdir(parents=True, exist_ok=True)
        export_onnx(model, spec, out)
        return f"the model, checked against ONNX Runtime, in {out}"
    rows = read_suspects(folder)
    if table == "issues":
        rows = issues_table(rows, sorted(rows["id"])).reset_index()
    out.parent.mkdir(parents=True, exist_ok=True)
    if ending == ".csv":
        write_csv(out, rows)
    else:
        write_parquet(out, rows)
    return f"{len(rows):,} rows in {out}"


def write_parquet(out: Path, table: pd.DataFrame) -> None:
    """Write a table as parquet, atomically."""
    require("writing parquet needs pyarrow: install it with  pip install 'antibackdoor[hf]'", "pyarrow")
    atomically(out, lambda part: table.to_parquet(part, engine="pyarrow", index=False))


def export_onnx(model: nn.Module, spec: Spec, out: Path) -> None:
    """Write `model` as ONNX with a free batch axis, and refuse to where ONNX Runtime does not give the same logits.

    Input "x": images `(n, C, H, W)` float32 in [0, 1], or series `(n, C, T)` of full length; output "logits" `(n, K)`.
    Classes and value range are in the file's metadata. Raises InputError without the packages, or where the network
    cannot be exported.
    """
    packages = ("onnx", "onnxruntime", "onnxscript")
    require("ONNX needs more packages: install them with  pip install 'antibackdoor[onnx]'", *packages)
    import onnx
    import onnxruntime

    model = model.cpu().eval()
    x = _examples(spec, 3)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        try:
            torch.onnx.export(
                _OneInput(model).eval(),
                (x,),
                path,
                input_names=["x"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # the exporter raises whatever the network's code leads to
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise InputError(f"this network cannot be written as ONNX: {reason}.") from None
        made = onnx.load(path)
        told: dict[str, Any] = {"classes": list(spec.classes), "kind": spec.kind, "shape": list(spec.shape)}
        told |= {"low": spec.low, "high": spec.high}
        onnx.helper.set_model_props(made, {key: json.dumps(value) for key, value in told.items()})
        onnx.checker.check_model(made)
        content = made.SerializeToString()
    _compare(model, onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]), spec)
    atomically(out, lambda part: part.write_bytes(content))


class _OneInput(nn.Module):
    """A network without its optional second argument."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits


def _examples(spec: Spec, count: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return spec.low + (spec.high - spec.low) * torch.rand(count, *spec.shape, generator=rng)


def _compare(model: nn.Module, session: Any, spec: Spec) -> None:
    """Batches of one and of five rows give the same logits in both."""
    for count in (1, 5):
        x = _examples(spec, count)
        with torch.no_grad():
            wanted: npt.NDArray[np.float32] = model(x).numpy()
        got = session.run(["logits"], {"x": x.numpy()})[0]
        worst = float(np.abs(got - wanted).max()) / max(float(np.abs(wanted).max()), 1.0)
        if got.shape != wanted.shape or not worst <= TOLERANCE:
            raise InputError(f"ONNX Runtime gives other logits than PyTorch (off by {worst:.2g}); nothing was written.")
