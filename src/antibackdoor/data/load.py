"""The one way in: whatever the user names -> Splits."""

from __future__ import annotations

from pathlib import Path

from antibackdoor.data.arrays import load_npz
from antibackdoor.data.catalog import CATALOG, load_named
from antibackdoor.data.core import Splits
from antibackdoor.data.images import load_folder, load_manifest
from antibackdoor.data.series import EXTENSIONS as SERIES
from antibackdoor.data.series import Missing, load_series
from antibackdoor.errors import InputError, unknown


def load(
    source: str | Path,
    *,
    test: str | Path | None = None,
    image_size: int | None = None,
    missing: Missing = "refuse",
    skip_unreadable: bool = False,
    memory_map: bool = False,
    data_root: Path | None = None,
) -> Splits:
    """Read a data set: a path goes before a name of the catalog.

    source: a folder of class folders (or with `train` and `test` folders of them), a CSV manifest (path,label[,split]),
        an `.npz`, a `.ts`, `.tsv` or `.arff` file or a folder with NAME_TRAIN and NAME_TEST, or a name of the catalog.
    test: a test set of the same format; it goes before a test set that `source` brings along.
    image_size: side in pixels that image files are resized to. skip_unreadable: leave damaged image files out.
    missing: what to do with gaps inside of series: refuse, interpolate or zero.
    memory_map: read an `.npz` from disk as needed. data_root: where NAME.npz files of the catalog lie.
    Raises InputError, one sentence, for everything that cannot be read or does not fit together.
    """
    path = Path(source)
    held = None if test is None else Path(test)
    if missing not in ("refuse", "interpolate", "zero"):
        raise unknown("choice for missing values", missing, ("refuse", "interpolate", "zero"))
    if not path.exists():
        return _load_named(str(source), held, image_size, missing, memory_map, data_root)
    if held is not None and not held.exists():
        raise InputError(f"the test set {held} does not exist.")
    kind = _kind(path)
    if held is not None and _kind(held) != kind:
        raise InputError(f"{path} is read as {kind} but the test set {held} as {_kind(held)}; give both in one format.")
    if memory_map and kind != "npz":
        raise InputError(f"{path} is read as {kind}, which cannot be memory-mapped; only .npz files can.")
    if kind == "npz":
        _refuse_size(path, image_size)
        return load_npz(path, test=held, missing=missing, memory_map=memory_map)
    if kind == "series":
        _refuse_size(path, image_size)
        return load_series(path, test=held, missing=missing)
    reader = load_manifest if kind == "manifest" else load_folder
    return reader(path, test=held, image_size=image_size, skip_unreadable=skip_unreadable)


def _load_named(
    name: str, test: Path | None, image_size: int | None, missing: Missing, memory_map: bool, data_root: Path | None
) -> Splits:
    if name in CATALOG and test is not None:
        raise InputError(f"{name} has its own test set; a separate one goes with a file or a folder only.")
    splits = load_named(name, data_root=data_root, missing=missing, memory_map=memory_map)
    _refuse_size(Path(name), image_size)
    return splits


def _kind(path: Path) -> str:
    """How a path is read, by its ending; folders by what they hold."""
    if path.is_dir():
        return (
            "series" if any(next(path.glob(f"*_{s}{e}"), None) for e in SERIES for s in ("TRAIN", "TEST")) else "images"
        )
    ending = path.suffix.lower()
    if ending in SERIES:
        return "series"
    if ending in (".npz", ".csv"):
        return "npz" if ending == ".npz" else "manifest"
    raise InputError(
        f"{path} is in no format that can be read: give a folder of class folders, "
        "or a file that ends in .csv, .npz, .ts, .tsv or .arff."
    )


def _refuse_size(path: Path, image_size: int | None) -> None:
    if image_size is not None:
        raise InputError(f"{path} holds arrays of one size already; image_size is for image files.")
