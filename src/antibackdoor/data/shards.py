"""WebDataset tar shards -> Splits: files of one sample share everything up to the first dot of their name.

Read with the standard library as a stream; nothing is unpacked to disk, so no name in an archive can lead anywhere.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from antibackdoor.data.core import Splits
from antibackdoor.data.decoding import EXTENSIONS as IMAGES
from antibackdoor.data.decoding import Size
from antibackdoor.data.labels import TEST_NAMES
from antibackdoor.data.npy import read_array
from antibackdoor.data.series import Missing
from antibackdoor.data.stream import Container, Labels, found_in, read_container
from antibackdoor.errors import InputError
from antibackdoor.limits import MAX_SAMPLE

EXTENSION = ".tar"
LABELS = ("cls", "label", "txt", "json")
MAX_MEMBERS = 100_000_000


def is_shard_folder(path: Path) -> bool:
    """Whether a folder holds tar shards, itself or in its folders."""
    return next(found_in(path, (EXTENSION,)), None) is not None


def load_shards(
    path: Path,
    *,
    test: Path | None = None,
    image_size: Size = None,
    missing: Missing = "refuse",
    skip: bool = False,
    memory_map: bool | None = False,
) -> Splits:
    """A `.tar` shard or a folder of them; shards whose path says test, val or validation are the test set.

    A sample is an image file (.jpg, .png, .webp ...) or an array of numbers (.npy, `(length,)` or `(channels,
    length)`), and its label beside it: .cls or .label (a number or a name), or .json with "label" or "cls". Ids are
    the samples' keys, with the name of their shard in front where keys of several shards are the same.
    Raises InputError for archives that are damaged, samples without label, and keys that come twice in a shard.
    """
    first, second = _files(path)
    if test is not None:
        own, other = _files(test)
        second = other or own
    if not first:
        raise InputError(f"{path} holds no training shard; all are named as test sets.")
    parts = [_Part(files) for files in (first, second) if files]
    return read_container(parts, path, image_size, missing, skip, memory_map)


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    if path.is_file():
        return [path], []
    files = sorted(found_in(path, (EXTENSION,)))
    test = [f for f in files if set(re.split(r"[^a-z]+", f.relative_to(path).as_posix().lower())) & set(TEST_NAMES)]
    return [file for file in files if file not in test], test


class _Part(Container):
    """One split. A first pass finds keys, labels and what the samples are; each later one hands out the samples."""

    def __init__(self, files: Sequence[Path]):
        self.files = files
        given: list[str | int] = []
        keys: list[tuple[str, str]] = []
        endings: set[str] = set()
        for file in files:
            for key, parts in _grouped(file):
                ending = _sample_ending(file, key, parts)
                keys.append((file.name, key))
                given.append(_label(file, key, parts))
                endings.add("npy" if ending == "npy" else "image")
        if not keys:
            raise InputError(f"{files[0]} holds no samples.")
        if len(endings) > 1:
            raise InputError(f"{files[0]}: some samples are images and some are arrays; a set must be of one kind.")
        self.image, self.labels = endings == {"image"}, Labels(given)
        alone = len({key for _, key in keys}) == len(keys)
        self.ids = [key if alone else f"{name}/{key}" for name, key in keys]
        if len(set(self.ids)) != len(self.ids):
            raise InputError(f"{files[0].parent}: two shards have the same name and the same keys; rename one.")

    def images(self) -> Iterator[bytes]:
        """The file of every sample, an image or an array."""
        for file in self.files:
            for key, parts in _grouped(file):
                yield parts[_sample_ending(file, key, parts)]

    def cases(self) -> Iterator[npt.NDArray[Any]]:
        """The array of every sample."""
        return map(_array, self.ids, self.images())


def _grouped(file: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and files (ending -> content) of every sample; only files that are needed are read."""
    current, parts, seen = "", dict[str, bytes](), set[str]()
    try:
        _check_whole(file)
        with tarfile.open(file, mode="r|", errorlevel=1) as archive:
            for member in _members(archive, file):
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                if not stem or not ending:
                    continue
                key, ending = f"{folder}/{stem}" if folder else stem, ending.lower()
                if key != current:
                    if parts:
                        yield current, parts
                    if key in seen:
                        raise InputError(f"{file} holds the sample {key!r} twice; its files must lie side by side.")
                    current, parts = key, {}
                    seen.add(key)
                if ending != "npy" and ending not in LABELS and f".{ending}" not in IMAGES:
                    continue
                if member.size > MAX_SAMPLE - sum(map(len, parts.values())):
                    raise InputError(f"{file}: {member.name!r} has {member.size:,} bytes; at most 64 MiB are read.")
                opened = archive.extractfile(member)
                parts[ending] = opened.read() if opened else b""
            if parts:
                yield current, parts
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {file} as a tar archive: {error}.") from None


def _members(archive: tarfile.TarFile, file: Path) -> Iterator[tarfile.TarInfo]:
    """The plain files of an archive; refused where they declare more bytes than it has (holes in them cost nothing)."""
    remembered: Any = archive
    told, size = 0, file.stat().st_size
    for count, member in enumerate(archive):
        remembered.members = []  # it would keep an entry for every file
        if count > MAX_MEMBERS:
            raise InputError(f"{file} holds more than {MAX_MEMBERS:,} files.")
        if not member.isfile():
            continue  # folders; links and devices are nothing to read
        told += member.size
        if told > size:
            raise InputError(f"{file}: {member.name!r} declares more bytes than the archive has.")
        yield member


def _check_whole(file: Path) -> None:
    """An archive that was cut off between two files reads like a whole one, but for the empty blocks at its end."""
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(max(size - 2 * tarfile.BLOCKSIZE, 0))
        if size % tarfile.BLOCKSIZE or opened.read() != bytes(2 * tarfile.BLOCKSIZE):
            raise InputError(f"{file} is no whole tar archive (its end is missing, or it is compressed).")


def _sample_ending(file: Path, key: str, parts: dict[str, bytes]) -> str:
    found = [ending for ending in parts if f".{ending}" in IMAGES or ending == "npy"]
    if len(found) != 1:
        what = "no image and no .npy array" if not found else f"several samples ({', '.join(found)})"
        raise InputError(f"{file}: the key {key!r} has {what}; one is needed.")
    return found[0]


def _label(file: Path, key: str, parts: dict[str, bytes]) -> str | int:
    for ending in LABELS:
        if ending not in parts:
            continue
        try:
            text: Any = parts[ending].decode("utf-8").strip()
            if ending == "json":
                told = json.loads(text)
                text = next(told[name] for name in ("label", "cls", "class") if name in told)
        except (ValueError, StopIteration, TypeError, RecursionError):
            raise InputError(f"{file}: {key!r}: its .{ending} holds no label.") from None
        if isinstance(text, str) and re.fullmatch(r"\d{1,9}", text):
            return int(text)
        if isinstance(text, bool) or not isinstance(text, int | str) or text == "":
            raise InputError(f"{file}: {key!r}: its .{ending} holds no label.")
        return text
    raise InputError(f"{file}: the sample {key!r} has no label; a .cls file (or .json with a label) is needed.")


def _array(name: str, encoded: bytes) -> npt.NDArray[Any]:
    try:
        return read_array(encoded)
    except MemoryError:
        raise
    except Exception as error:  # a damaged header surfaces as any of a dozen types
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"the array of sample {name!r} cannot be read: {reason}.") from None
