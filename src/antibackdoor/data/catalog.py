"""Named data sets: a local `NAME.npz` first, then the user's cache, then a download; two are embedded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from antibackdoor.data.arrays import load_npz, write_npz
from antibackdoor.data.copies import cache_root
from antibackdoor.data.core import Data, Kind, Spec, Splits
from antibackdoor.data.series import Missing, from_cases
from antibackdoor.errors import InputError, unknown

EMBEDDED = Path(__file__).parent / "embedded"
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


@dataclass(frozen=True)
class Entry:
    """One named data set; `fetch` downloads it into a folder, or makes it where it is embedded; mirror: see `Spec`."""

    name: str
    kind: Kind
    description: str
    source: str
    terms: str
    fetch: Callable[[Path], Splits] | None = None
    embedded: bool = False
    mirror: bool = True


def load_named(
    name: str, *, data_root: Path | None = None, missing: Missing = "refuse", memory_map: bool = False
) -> Splits:
    """A data set of the catalog by name.

    data_root: a folder that may hold NAME.npz; by default `$ANTIBACKDOOR_DATA`. Downloads go, converted, to
    `$ANTIBACKDOOR_CACHE` or ~/.cache/antibackdoor. Raises InputError for unknown names and failed downloads.
    """
    if name not in CATALOG:
        raise unknown("data set (and no file or folder)", name, CATALOG)
    entry = CATALOG[name]
    if entry.embedded and entry.fetch:
        return entry.fetch(EMBEDDED)
    found = found_named(name, data_root)
    if found is not None:
        return load_npz(found, missing=missing, memory_map=memory_map)
    cache = cache_root()
    remedy = f"put {name}.npz into the folder that --data-root or $ANTIBACKDOOR_DATA names"
    if entry.fetch is None:
        raise InputError(f"{name} cannot be downloaded; {remedy}.")
    try:
        (cache / "downloads").mkdir(parents=True, exist_ok=True)
        write_npz(cache / f"{name}.npz", entry.fetch(cache / "downloads"))
    except InputError:
        raise
    except Exception as error:  # networks, proxies, archives and mirrors fail in every way there is
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{name} could not be downloaded ({reason}); {remedy}.") from None
    return load_npz(cache / f"{name}.npz", missing=missing, memory_map=memory_map)


def found_named(name: str, data_root: Path | None = None) -> Path | None:
    """Where a data set of the catalog lies on this machine; None where it has to be downloaded."""
    if CATALOG[name].embedded:
        return EMBEDDED
    if data_root is None and os.environ.get("ANTIBACKDOOR_DATA"):
        data_root = Path(os.environ["ANTIBACKDOOR_DATA"])
    places = (folder / f"{name}.npz" for folder in (data_root, cache_root()) if folder is not None)
    return next((path for path in places if path.is_file()), None)


def _images(classes: tuple[str, ...], *parts: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]) -> Splits:
    """Splits from (pixels `(n, 3, H, W)`, labels) of the training and the test set."""
    data = []
    for x, y in parts:
        ids = [str(row) for row in range(len(y))]
        spec = Spec("image", tuple(x.shape[1:]), classes)
        data.append(Data(torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y), spec, ids))
    return Splits(*data)


def _fetch_cifar10(folder: Path) -> Splits:
    from torchvision.datasets.utils import download_and_extract_archive

    # The binary edition: the one that torchvision.datasets.CIFAR10 reads is made of pickles.
    download_and_extract_archive(CIFAR10_URL, str(folder), md5=CIFAR10_MD5)
    return read_cifar10(folder / "cifar-10-batches-bin")


def read_cifar10(folder: Path) -> Splits:
    """The binary batches of CIFAR-10: one byte of label and 3072 of pixels, channels first, for each image."""
    parts = []
    for files in ([f"data_batch_{k}.bin" for k in range(1, 6)], ["test_batch.bin"]):
        rows = np.concatenate([np.fromfile(folder / file, dtype=np.uint8).reshape(-1, 3073) for file in files])
        parts.append((rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].astype(np.int64)))
    return _images(CIFAR10, *parts)


def _collect(dataset: Any, side: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """All of a torchvision set, resized to one size."""
    from PIL import Image

    x, y = np.empty((len(dataset), 3, side, side), dtype=np.uint8), np.empty(len(dataset), dtype=np.int64)
    for row in range(len(dataset)):
        image, y[row] = dataset[row]
        small = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
        x[row] = np.asarray(small).transpose(2, 0, 1)
    return x, y


def _fetch_gtsrb(folder: Path) -> Splits:
    from torchvision.datasets import GTSRB

    parts = [_collect(GTSRB(str(folder), split=split, download=True), 32) for split in ("train", "test")]
    return _images(tuple(str(sign) for sign in range(43)), *parts)


def _fetch_imagenette(folder: Path) -> Splits:
    from torchvision.datasets import Imagenette

    sets = [Imagenette(str(folder), split=split, size="160px", download=True) for split in ("train", "val")]
    return _images(tuple(names[0] for names in sets[0].classes), *[_collect(dataset, 64) for dataset in sets])


def _fetch_series(archive_name: str) -> Callable[[Path], Splits]:
    def fetch(folder: Path) -> Splits:
        try:
            from aeon.datasets import load_classification
        except ImportError:
            raise InputError(
                f"downloading {archive_name} needs the package aeon: pip install 'antibackdoor[series]'."
            ) from None
        parts: list[Any] = []
        for split in ("train", "test"):
            cases, names = load_classification(archive_name, split=split, extract_path=str(folder))
            parts += [list(cases), names.astype(str).tolist()]
        return from_cases(*parts, where=archive_name)

    return fetch


def _make_digits(_: Path) -> Splits:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = np.rint(bunch.images * (255 / 16)).astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    x = np.repeat(x[:, None], 3, axis=1)
    # Every so-manieth row of the rows sorted by class: 500 test images, stratified, without a random state.
    by_class = np.argsort(bunch.target, kind="stable")
    test = np.zeros(len(x), dtype=bool)
    test[by_class[np.linspace(0, len(x) - 1, 500).astype(int)]] = True
    y = bunch.target.astype(np.int64)
    return _images(tuple(str(digit) for digit in range(10)), (x[~test], y[~test]), (x[test], y[test]))


def _read_japanese_vowels(folder: Path) -> Splits:
    return load_npz(folder / "japanese_vowels.npz")


_ARCHIVE = "free for research, cite the UCR/UEA archive and the donors"
_ENTRIES = (
    Entry("cifar10", "image", "50,000 + 10,000 photos, 32x32, 10 classes", "Krizhevsky 2009",
          "no licence named, cite the technical report", _fetch_cifar10),
    Entry("gtsrb", "image", "39,209 + 12,630 traffic signs, 32x32, 43 classes", "Stallkamp et al. 2012",
          "free for research, cite the paper", _fetch_gtsrb, mirror=False),
    Entry("imagenette", "image", "9,469 + 3,925 photos, 64x64, 10 easy classes of ImageNet", "fastai, Deng et al. 2009",
          "Apache-2.0; the photos under ImageNet's terms (non-commercial research)", _fetch_imagenette),
    Entry("ecg5000", "series", "500 + 4,500 heartbeats, 1x140, 5 classes, very unbalanced", "UCR archive", _ARCHIVE,
          _fetch_series("ECG5000")),
    Entry("uwave", "series", "120 + 320 gestures, 3x315, 8 classes", "UEA archive, Liu et al. 2009", _ARCHIVE,
          _fetch_series("UWaveGestureLibrary")),
    Entry("uwave_extended", "series", "937 + 320 gestures, 3x315, 8 classes (uwave and more of the UCR recordings)",
          "UEA and UCR archives, Liu et al. 2009", _ARCHIVE),
    Entry("arabic_digits", "series", "6,600 + 2,200 spoken digits, 13 x 4..93, 10 classes (1 less each if downloaded)",
          "UCI, Hammami and Bedda 2010", "CC BY 4.0", _fetch_series("SpokenArabicDigits")),
    Entry("digits", "image", "1,297 + 500 handwritten digits, 8x8 enlarged to 16x16, 10 classes; embedded",
          "UCI optdigits through scikit-learn, Alpaydin and Kaynak 1998", "CC BY 4.0", _make_digits, embedded=True,
          mirror=False),
    Entry("japanese_vowels", "series", "270 + 370 spoken vowels, 12 x up to 29, 9 speakers; embedded",
          "UCI, Kudo, Toyama and Shimbo 1999", "CC BY 4.0", _read_japanese_vowels, embedded=True),
)  # fmt: skip
CATALOG: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
"""All named data sets; `list datasets` shows them."""
