"""The one way in: whatever the user names -> Splits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from antibackdoor.data.arrays import load_npz, load_samples_npz
from antibackdoor.data.arrow import EXTENSIONS as TABLES
from antibackdoor.data.arrow import is_arrow_folder, load_arrow
from antibackdoor.data.catalog import CATALOG, found_named, load_named
from antibackdoor.data.copies import fills_memory
from antibackdoor.data.core import Data, Spec, Splits
from antibackdoor.data.decoding import EXTENSIONS as IMAGES
from antibackdoor.data.decoding import Size
from antibackdoor.data.file_lists import (
    FileList,
    has_class_folders,
    in_folder,
    in_manifest,
    is_manifest,
    listed,
    unlabeled,
)
from antibackdoor.data.images import load_images
from antibackdoor.data.labels import UNKNOWN
from antibackdoor.data.objects import load_dataset
from antibackdoor.data.recordings import EXTENSIONS as RECORDINGS
from antibackdoor.data.recordings import load_recordings
from antibackdoor.data.series import EXTENSIONS as SERIES
from antibackdoor.data.series import Missing, load_series, refuse_image_options
from antibackdoor.data.shards import EXTENSION as SHARD
from antibackdoor.data.shards import is_shard_folder, load_shards
from antibackdoor.data.tables import is_table, load_table
from antibackdoor.errors import InputError, LeftOut, unknown
from antibackdoor.limits import inside, refuse_special


def load(
    source: str | Path | Dataset[Any],
    *,
    test: str | Path | Dataset[Any] | None = None,
    image_size: Size = None,
    missing: Missing = "refuse",
    skip_unreadable: bool = False,
    memory_map: bool | None = None,
    data_root: Path | None = None,
    mirror: bool | None = None,
) -> Splits:
    """Read a data set: a path goes before a name of the catalog.

    source: a folder of class folders (or with `train` and `test` folders of them) or a CSV manifest
        (path,label[,split]), both of images or of recordings (`.csv`, `.tsv`, `.txt`, `.npy`), a CSV table of series
        (label,[id,][split,] values), an `.npz`, a `.ts`,
        `.tsv` or `.arff` file or a folder with NAME_TRAIN and NAME_TEST, a parquet or arrow file or a folder of them or
        of Hugging Face's `save_to_disk`, WebDataset `.tar` shards, a folder that `antibackdoor poison` wrote, a name of
        the catalog, or a torch `Dataset`.
    test: a test set of the same format; it goes before a test set that `source` brings along.
    image_size: side in pixels that image files are resized to. skip_unreadable: leave damaged files out.
    missing: what to do with gaps inside of series: refuse, interpolate or zero.
    memory_map: read images, or an `.npz`, from disk as needed, out of a copy made once in $ANTIBACKDOOR_CACHE (else
        ~/.cache/antibackdoor); the same results as in memory. None: where they would fill a quarter of the memory.
    data_root: where NAME.npz files of the catalog lie.
    mirror: False where mirrored images mean something else (signs, text), so that training must not mirror them. None:
        as the data say, if they do; else they may be.
    Raises InputError, one sentence, for everything that cannot be read or does not fit together.
    """
    if not isinstance(source, str | Path):
        if isinstance(test, str | Path):
            raise InputError("the test set of a torch Dataset must be a Dataset too.")
        return _mirrored(load_dataset(source, test=test, image_size=image_size, missing=missing), mirror)
    if test is not None and not isinstance(test, str | Path):
        raise InputError("a torch Dataset as test set goes with a Dataset as training set only.")
    if not str(source).strip():
        raise InputError("the data have no name: an empty path was given.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LeftOut)
        splits = _load(source, test, image_size, missing, skip_unreadable, memory_map, data_root)
    notes = tuple(str(one.message) for one in caught if issubclass(one.category, LeftOut))
    for one in caught:
        warnings.warn(one.message, one.category, stacklevel=2)
    told = {
        "source": _place(source),
        "test": None if test is None else _place(test),
        "image_size": image_size,
        "missing": missing,
        "skip_unreadable": skip_unreadable,
        "memory_map": memory_map,
        "data_root": None if data_root is None else _place(data_root),
        "mirror": mirror,
    }
    if mirror is None and not Path(source).exists():
        mirror = None if CATALOG[str(source)].mirror else False
    return replace(_mirrored(splits, mirror), source=told, notes=notes)


def _mirrored(splits: Splits, mirror: bool | None) -> Splits:
    """With the user's word on whether images may be mirrored, if there is one."""
    if mirror is None or mirror == splits.train.spec.mirror:
        return splits
    spec = replace(splits.train.spec, mirror=mirror)
    held = None if splits.test is None else replace(splits.test, spec=replace(splits.test.spec, mirror=mirror))
    return replace(splits, train=replace(splits.train, spec=spec), test=held)


def known(source: str) -> bool:
    """Whether `load` can make anything of this path or name, be it by a download."""
    return Path(source).exists() or source in CATALOG


def at_hand(source: str, data_root: Path | None = None) -> bool:
    """Whether `load` finds this path or name without reaching for the network."""
    return Path(source).exists() or (source in CATALOG and found_named(source, data_root) is not None)


def _place(source: str | Path) -> str:
    """A path that means the same in any working folder; names of the catalog as they are."""
    return str(Path(source).resolve()) if Path(source).exists() else str(source)


def _load(
    source: str | Path,
    test: str | Path | None,
    image_size: Size,
    missing: Missing,
    skip_unreadable: bool,
    memory_map: bool | None,
    data_root: Path | None,
) -> Splits:
    path = _inside(Path(source))
    held = None if test is None else Path(test)
    if missing not in ("refuse", "interpolate", "zero"):
        raise unknown("choice for missing values", missing, ("refuse", "interpolate", "zero"))
    refuse_special(path)
    if not path.exists():
        return _load_named(str(source), held, image_size, missing, bool(memory_map), data_root)
    if held is not None and not held.exists():
        raise InputError(f"the test set {held} does not exist.")
    kind = _kind(path)
    if held is not None and _kind(held) != kind:
        raise InputError(f"{path} is read as {kind} but the test set {held} as {_kind(held)}; give both in one format.")
    if kind == "npz":
        _refuse_size(path, image_size)
        from_disk = fills_memory(path) if memory_map is None else memory_map
        return load_npz(path, test=held, missing=missing, memory_map=from_disk)
    if kind in ("series", "table"):
        refuse_image_options(path, image_size, memory_map)
        return (load_series if kind == "series" else load_table)(path, test=held, missing=missing)
    if kind in ("arrow", "shards"):
        stream = load_arrow if kind == "arrow" else load_shards
        return stream(
            path, test=held, image_size=image_size, missing=missing, skip=skip_unreadable, memory_map=memory_map
        )
    lists = in_manifest(path, held) if kind == "manifest" else in_folder(path, held)
    if _of_images(lists):
        splits = load_images(lists, path, image_size=image_size, skip_unreadable=skip_unreadable, memory_map=memory_map)
    else:
        refuse_image_options(path, image_size, memory_map)
        splits = load_recordings(lists, path, missing=missing, skip_unreadable=skip_unreadable)
    return replace(splits, files=tuple(files.root for files in lists))


def _of_images(lists: Sequence[FileList]) -> bool:
    """Whether files are images, or are to be refused as such; else they are recordings."""
    return any(files.any_ends_in(IMAGES) for files in lists) or not any(
        files.any_ends_in(RECORDINGS) for files in lists
    )


def _asked_about(path: Path) -> FileList | None:
    """The files that a path names or holds without classes, or that a manifest lists; None for other sets."""
    if path.is_dir():
        return unlabeled(path) if _kind(path) == "class folders" and not has_class_folders(path) else None
    ending = path.suffix.lower()
    if not path.is_file() or ending not in (*IMAGES, ".npy", ".txt", ".csv"):
        return None
    if ending == ".csv" and is_manifest(path, unlabeled=True):
        return listed(path)
    return None if ending == ".csv" and is_table(path) else unlabeled(path)


def load_samples(
    source: str | Path,
    spec: Spec,
    *,
    missing: Missing = "refuse",
    skip_unreadable: bool = False,
    data_root: Path | None = None,
) -> tuple[Data, list[str] | None]:
    """Samples for a model that takes `spec`, and the names of their labels where they have any.

    source: as for `load` (of a set that has one, the test set), and what needs no labels: a folder of image files or of
    recordings, one such file (but no `.tsv`, whose lines are series with labels), a CSV manifest or table without the
    column label, or an `.npz` with x only. Classes may be others than the model's. Images are resized to its size.
    """
    path = _inside(Path(source))
    size = (spec.shape[2], spec.shape[1]) if spec.kind == "image" else (0, 0)
    names: list[str] | None = None
    if (files := _asked_about(path)) is not None:
        if _of_images([files]):
            _same_kind("image", spec, path)
            data = load_images([files], path, image_size=size, skip_unreadable=skip_unreadable).train
        else:
            _same_kind("series", spec, path)
            data = load_recordings([files], path, missing=missing, skip_unreadable=skip_unreadable).train
        labeled = data.spec.classes != (UNKNOWN,)
    elif path.is_file() and path.suffix.lower() == ".npz":
        data, labeled = load_samples_npz(path, missing)
    elif path.is_file() and _kind(path) == "table":
        splits = load_table(path, missing=missing, unlabeled=True)
        data = splits.test or splits.train
        labeled = data.spec.classes != (UNKNOWN,)
    else:
        resized = spec.kind == "image" and path.exists() and _kind(path) not in {"npz", "series"}
        splits = load(
            path if path.exists() else source,
            image_size=size if resized else None,
            missing=missing,
            skip_unreadable=skip_unreadable,
            data_root=data_root,
        )
        data, labeled = splits.test or splits.train, True
    _same_kind(data.spec.kind, spec, path)
    if labeled:
        names = [data.spec.classes[k] for k in data.y.tolist()]
    if len(data) == 0:
        raise InputError(f"{path} holds no samples.")
    return _fitted(torch.cat([data.x[rows] for rows in data.chunks()]), data.ids, data.lengths, spec, path), names


def _same_kind(kind: str, spec: Spec, path: Path) -> None:
    if kind != spec.kind:
        raise InputError(f"{path} holds data of kind {kind!r}, but the model takes {spec.kind!r}.")


def _fitted(x: Tensor, ids: Sequence[str], lengths: Tensor | None, spec: Spec, path: Path) -> Data:
    """Samples as the model takes them: channels must fit, images are resized, series may have any length."""
    channels, shape = spec.shape[0], tuple(x.shape[1:])
    if spec.kind == "image" and shape[0] == 1:
        x = x.expand(-1, channels, -1, -1)
    elif shape[0] != channels:
        raise InputError(f"{path}: the samples have {shape[0]} channels, but the model takes {channels}.")
    if spec.kind == "image" and shape[1:] != spec.shape[1:]:
        x = F.interpolate(x.float(), spec.shape[1:], mode="bilinear", antialias=True).round().clamp(0, 255).to(x.dtype)
    fits = replace(spec, shape=tuple(x.shape[1:]))
    return Data(x, torch.zeros(len(x), dtype=torch.int64), fits, ids, lengths)


RUN = ("config.json", "suspects.csv")
WRITTEN = (("attack.json", "truth.csv"), ("keep.txt", "drop.csv"))
"""What lies beside the data in folders of our own."""


def _inside(path: Path) -> Path:
    """The data in a folder that `antibackdoor poison`, or `antibackdoor review` with --export, wrote."""
    if all((path / name).is_file() for name in RUN):
        raise InputError(f"{path} holds a run, not data; give the data that it was made from.")
    if any(all((path / name).is_file() for name in names) for names in WRITTEN):
        found = next((file for name in ("data.npz", "data.csv") if (file := path / name).is_file()), path / "data")
        return inside(found, path)
    return path


def _load_named(
    name: str,
    test: Path | None,
    image_size: Size,
    missing: Missing,
    memory_map: bool,
    data_root: Path | None,
) -> Splits:
    if name in CATALOG and test is not None:
        raise InputError(f"{name} has its own test set; a separate one goes with a file or a folder only.")
    splits = load_named(name, data_root=data_root, missing=missing, memory_map=memory_map)
    _refuse_size(Path(name), image_size)
    return splits


def _kind(path: Path) -> str:
    """How a path is read, by its ending; folders by what they hold."""
    if path.is_dir():
        if any(next(path.glob(f"*_{s}{e}"), None) for e in SERIES for s in ("TRAIN", "TEST")):
            return "series"
        return "arrow" if is_arrow_folder(path) else "shards" if is_shard_folder(path) else "class folders"
    endings = {**dict.fromkeys(SERIES, "series"), **dict.fromkeys(TABLES, "arrow")}
    endings |= {".npz": "npz", SHARD: "shards"}
    if path.suffix.lower() == ".csv":
        return "manifest" if is_manifest(path) else "table"
    if path.suffix.lower() in endings:
        return endings[path.suffix.lower()]
    raise InputError(
        f"{path} is in no format that can be read: give a folder of class folders, "
        "or a file that ends in .csv, .npz, .ts, .tsv, .arff, .parquet, .arrow or .tar."
    )


def _refuse_size(path: Path, image_size: Size) -> None:
    if image_size is not None:
        raise InputError(f"{path} holds arrays of one size already; image_size is for image files.")
