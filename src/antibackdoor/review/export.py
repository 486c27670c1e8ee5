"""The cleaned set on the disk: a folder of images, a manifest or an `.npz`, with `keep.txt` and `drop.csv`."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from antibackdoor.data.arrays import write_npz
from antibackdoor.data.core import Data, Splits
from antibackdoor.data.folders import Names, folder_names, write_class_folders
from antibackdoor.errors import InputError, unknown
from antibackdoor.files import HARMFUL, at_once, csv_cell
from antibackdoor.review.decisions import Undecided
from antibackdoor.review.session import Session

Form: TypeAlias = Literal["folder", "csv", "npz"]
FORMS: tuple[Form, ...] = get_args(Form)


def export(session: Session, out: Path, form: Form, undecided: Undecided = "drop", *, replace: bool = False) -> str:
    """Write the cleaned set into the folder `out`, which appears complete or not at all; returns what was written.

    folder: `data/CLASS/...` with the original files where the data came as files (of other images, PNG files of the
    decoded pixels); `data/train` and `data/test` where there is a test set. csv: `labels.csv` (path, label, split) for
    the files as they lie, to be copied beside them (id instead of path for samples that are no files). npz: `data.npz`.
    Always: `keep.txt`, the ids of what stays, one a line, and `drop.csv`, what was dropped or relabeled.
    replace: take the place of an earlier export. Raises InputError where `out` is in use or cannot be written.
    """
    if form not in FORMS:
        raise unknown("format", form, FORMS)
    stays, labels = session.decisions.cleaned(session.flagged, session.suggested, undecided)
    cleaned = session.cleaned(undecided)
    files = session.splits.files
    if form == "csv" and len(set(files)) > 1:
        raise InputError(
            f"the test set lies in {files[1]}, out of reach of a list in {files[0]}; export a folder or npz."
        )
    with at_once(out, replace=replace) as part:
        if form == "npz":
            write_npz(part / "data.npz", cleaned)
        elif form == "csv":
            _write_manifest(part / "labels.csv", cleaned, "path" if files else "id")
        else:
            _write_folder(part / "data", cleaned, files)
        _write_lists(part, session, stays, labels)
    changed = int((labels != session.data.y.cpu().numpy())[stays].sum())
    beside = f"; labels.csv is to be put into {files[0]}, whose files it lists" if form == "csv" and files else ""
    counts = f"{int(stays.sum()):,} of {len(stays):,} samples kept, {int((~stays).sum()):,} dropped"
    return f"{counts}, {changed:,} relabeled{beside}"


def _write_manifest(path: Path, cleaned: Splits, first: str) -> None:
    """path (or id, where samples are no files), label, split; names stay as they are, to name the files exactly."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
        table.writerow([first, "label", "split"])
        for split, data in (("train", cleaned.train), ("test", cleaned.test)):
            if data is None:
                continue
            names = [data.spec.classes[k] for k in data.y.tolist()]
            for name in (*data.ids, *names):
                if csv_cell(name) != name:
                    raise InputError(
                        f"{name!r} could run as a formula or hide something where a table is opened; "
                        "export a folder or an npz instead."
                    )
            table.writerows([name, label, split] for name, label in zip(data.ids, names, strict=True))


def _write_folder(root: Path, cleaned: Splits, files: Sequence[Path]) -> None:
    if not files and cleaned.train.spec.kind != "image":
        raise InputError("series that were not read from files of their own can be exported as npz only.")
    folders = folder_names(cleaned.train.spec.classes)
    for number, (split, data) in enumerate((("train", cleaned.train), ("test", cleaned.test))):
        if data is None:
            continue
        part = split if cleaned.test is not None else ""
        if files:
            _copy_files(data, files[number], root / part, folders)
        else:
            write_class_folders(data, root, part, folders)


def _copy_files(data: Data, files: Path, root: Path, folders: list[str]) -> None:
    """The original files, under their own names where these are free."""
    given = [Names() for _ in folders]
    inside = files.resolve()
    for row, (label, name) in enumerate(zip(data.y.tolist(), data.ids, strict=True)):
        source = (files / name).resolve()
        if not source.is_relative_to(inside):
            raise InputError(f"{name!r} leads out of {files}; it is not copied.")
        (root / folders[label]).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, root / folders[label] / given[label].give(Path(name).name, row))


def _write_lists(part: Path, session: Session, stays: npt.NDArray[np.bool_], labels: npt.NDArray[np.int64]) -> None:
    """`keep.txt`, ids one a line (one with control characters or a leading quote as a JSON string), and `drop.csv`."""
    data, classes = session.data, session.data.spec.classes
    kept = [data.ids[row] for row in np.flatnonzero(stays)]
    lines = [json.dumps(name) if name.startswith('"') or HARMFUL.search(name) else name for name in kept]
    (part / "keep.txt").write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8"))
    given = data.y.cpu().numpy()
    with (part / "drop.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
        table.writerow(["id", "label", "action", "new_label", "score", "flagged", "reason"])
        changed = np.flatnonzero(~stays | (labels != given))
        for row in changed[np.argsort(-session.table["score"].to_numpy()[changed], kind="stable")]:
            new = classes[labels[row]] if stays[row] else ""
            cells = [data.ids[row], classes[given[row]], "relabel" if stays[row] else "drop", new]
            numbers = [float(f"{session.table['score'][row]:.6g}"), bool(session.flagged[row])]
            table.writerow([*map(csv_cell, cells), *numbers, csv_cell(session.table["reason"][row])])
