"""What flows through the package: `Data`, which a defender may see, and `Truth`, which only the judge may."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from antibackdoor.errors import InputError
from antibackdoor.limits import MAX_CLASSES, MAX_NAME

Kind = Literal["image", "series"]


class Rows(Protocol):
    """Samples that can be gathered by row number: a tensor, a file, an overlay."""

    @property
    def shape(self) -> Sequence[int]:
        """`(n, ...)`."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """As stored: uint8 for images, float32 for series."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Spec:
    """What one sample is.

    kind: "image", stored as uint8 `(C, H, W)`, or "series", stored as float32 `(C, T)`.
    low, high: the range that values keep. Images: 0 and 1 (after division by 255). Series: range of the training data.
    mirror: whether a mirrored image is still of its class, so that training may mirror it; signs and text are not.
    """

    kind: Kind
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    low: float = 0.0
    high: float = 1.0
    mirror: bool = field(default=True, repr=False)

    def decode(self, stored: Tensor) -> Tensor:
        """Stored rows -> float32, images in [0, 1]."""
        return stored.float().div_(255) if self.kind == "image" else stored.float()

    def encode(self, x: Tensor) -> Tensor:
        """Float rows -> stored rows: clipped to [low, high] in float FIRST, then, for images, put on the 8-bit grid."""
        x = x.clamp(self.low, self.high)
        return _pixels(x) if self.kind == "image" else x.float()


def _pixels(x: Tensor) -> Tensor:
    """Floats in [0, 1] on the 8-bit grid."""
    return x.mul(255).round_().to(torch.uint8)


def as_stored(x: Tensor, kind: Kind) -> Tensor:
    """Samples as programs pass them around -> stored rows; nothing is clipped, so that nothing is guessed.

    Images are uint8, taken as they are, or floats in [0, 1]; series are numbers of any type.
    Raises InputError for images in another range and for values that float32 does not hold.
    """
    if kind == "image" and x.dtype == torch.uint8:
        return x
    x = x.float()
    if not x.isfinite().all():
        raise InputError("the samples hold values that are NaN, infinite, or too large for float32.")
    if kind == "series":
        return x
    if ((x < 0) | (x > 1)).any():
        raise InputError("images must be uint8, or floats in [0, 1] without normalization.")
    return _pixels(x)


@dataclass(frozen=True)
class Data:
    """A labeled set as given: everything a defender may see.

    x: `(n, C, H, W)` uint8 or `(n, C, T)` float32; series of unequal length are zero after `lengths`.
    y: `(n,)` int64, labels as given, in 0..K-1.
    ids: n stable names (relative file path or row number); reports, exports and metrics use these.
    lengths: `(n,)` int64 for series of unequal length, else None.
    Raises InputError when these do not fit together or a value is not finite.
    """

    x: Rows
    y: Tensor
    spec: Spec
    ids: Sequence[str]
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        n, want = len(self.y), torch.uint8 if self.spec.kind == "image" else torch.float32
        if len(self.x) != n or len(self.ids) != n:
            raise InputError(f"{len(self.x)} samples, {n} labels and {len(self.ids)} ids: their numbers must be equal.")
        if tuple(self.x.shape[1:]) != self.spec.shape or self.x.dtype != want:
            raise InputError(
                f"{self.spec.kind} samples must be {want} of shape {self.spec.shape}, "
                f"got {self.x.dtype} of shape {tuple(self.x.shape[1:])}."
            )
        if len(self.spec.classes) > MAX_CLASSES:
            raise InputError(
                f"{len(self.spec.classes):,} classes are more than the {MAX_CLASSES:,} that are supported."
            )
        if max(map(len, chain(self.ids, self.spec.classes)), default=0) > MAX_NAME:
            raise InputError(f"an id or the name of a class is longer than {MAX_NAME:,} characters.")
        broken = next((name for name in chain(self.ids, self.spec.classes) if not _is_text(name)), None)
        if broken is not None:
            raise InputError(f"the name {broken!r} is no text, so that no table can hold it; rename it.")
        if n and not 0 <= int(self.y.min()) <= int(self.y.max()) < len(self.spec.classes):
            bad = int(((self.y < 0) | (self.y >= len(self.spec.classes))).nonzero()[0])
            raise InputError(
                f"sample {self.ids[bad]!r} has label {int(self.y[bad])}, outside 0..{len(self.spec.classes) - 1}."
            )
        if self.lengths is not None:
            bad_length = (self.lengths < 1) | (self.lengths > self.spec.shape[-1])
            if len(self.lengths) != n or bad_length.any():
                raise InputError(f"lengths must be {n} numbers in 1..{self.spec.shape[-1]}.")

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Tensor) -> Data:
        """The samples at these row numbers, in this order, as a set of its own."""
        lengths = None if self.lengths is None else self.lengths[rows]
        return replace(
            self, x=taken(self.x, rows), y=self.y[rows], ids=[self.ids[i] for i in rows.tolist()], lengths=lengths
        )

    def chunks(self) -> Iterator[Tensor]:
        """Row numbers in `pieces`."""
        return pieces(self.x)

    def fingerprint(self) -> str:
        """A content hash of samples, labels, ids and spec; equal for the same data in memory or on disk.

        128 of SHA-256's bits: the data come from whoever might want two sets to be taken for each other.
        """
        digest = hashlib.sha256(repr(self.spec).encode())
        digest.update(b"" if self.spec.mirror else b"never mirrored")
        digest.update(self.y.cpu().numpy().astype("<i8").tobytes())
        digest.update("\x00".join(self.ids).encode("utf-8", "surrogatepass"))
        if self.lengths is not None:
            digest.update(self.lengths.cpu().numpy().astype("<i8").tobytes())
        for rows in self.chunks():
            digest.update(np.ascontiguousarray(self.x[rows].cpu().numpy()).tobytes())
        return digest.hexdigest()[:32]


def _is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8; the names of files may hold any bytes."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def pieces(x: Rows) -> Iterator[Tensor]:
    """Row numbers `0..n-1` in pieces of at most 4,096 rows and 32 MiB, for passes in bounded memory."""
    row = math.prod(x.shape[1:]) * x.dtype.itemsize
    return iter(torch.arange(len(x)).split(min(4096, max(1, 2**25 // row))))


def taken(x: Rows, rows: Tensor) -> Rows:
    """These rows: copied where they are in memory, looked up where they are not."""
    from antibackdoor.data.rows import View

    return x[rows] if isinstance(x, Tensor) else View(x, rows)


@dataclass(frozen=True)
class Splits:
    """What a reader returns: the untrusted training set and, where there is one, a test set of the same spec.

    source: the arguments of `load` that these were read with, as plain JSON values, so that they can be read again;
        "reviews" among them tells the run folders whose reviews cleaned them since.
    name: what the user called the data, a path or a name; only shown. notes: sentences about what was not read.
    files: where each sample was read from a file of its own, the folder that the ids of each part are relative to.
    """

    train: Data
    test: Data | None = None
    source: Mapping[str, Any] | None = field(default=None, kw_only=True)
    name: str = field(default="", kw_only=True)
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    files: tuple[Path, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if self.test is None:
            return
        if self.test.spec.shape != self.train.spec.shape or self.test.spec.kind != self.train.spec.kind:
            raise InputError(
                f"training samples have shape {self.train.spec.shape} but test samples {self.test.spec.shape}; "
                "give both in one shape."
            )
        if self.test.spec.classes != self.train.spec.classes:
            raise InputError("the training set and the test set do not name the same classes in the same order.")


@dataclass(frozen=True)
class Truth:
    """What an attack did; only the judge may read it.

    poisoned, cover: `(n,)` bool; cover samples carry the trigger and keep their true label.
    labels: `(n,)` int64, the labels before poisoning.
    targets: `(n,)` int64, the class that the trigger on each sample leads to, or would lead to were it triggered; the
        same for all with most attacks. -1 where nothing was attacked.
    """

    poisoned: Tensor
    cover: Tensor
    labels: Tensor
    targets: Tensor


MANY_CLASSES = 20
"""So many may have hardly more than a sample each, in a set of a few; of more, that is a mistake."""


def check_trainable(data: Data, test: Data | None = None) -> None:
    """Refuse what nothing can be learned from, in one sentence: no samples, one class, series of length 1, NaN.

    And a test set that would measure something else than what is trained: one that lacks a class of the training set.
    """
    if len(data) == 0:
        raise InputError("the training set holds no samples.")
    present = data.y.unique()
    if len(present) < 2:
        only = data.spec.classes[int(present[0])]
        raise InputError(f"all {len(data)} training samples belong to one class ({only!r}); at least two are needed.")
    if len(present) > max(MANY_CLASSES, len(data) / 2):
        raise InputError(
            f"there are {len(present):,} classes among {len(data):,} training samples: labels that differ from sample "
            "to sample are no classes; give the class of each (of a measured value, its range)."
        )
    lacking = [] if test is None else sorted(set(present.tolist()) - set(test.y.tolist()))
    if lacking:
        more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        raise InputError(
            f"the test set has no sample of the class {data.spec.classes[lacking[0]]!r}{more}, and cannot tell how "
            "well that is learned; add some, or give the training samples alone."
        )
    if data.spec.kind == "series":
        if data.spec.shape[-1] < 2:
            raise InputError("the series have length 1; there is no time course to learn from.")
        for rows in data.chunks():
            finite = data.x[rows].isfinite().flatten(1).all(1)
            if not finite.all():
                bad = data.ids[int(rows[~finite][0])]
                raise InputError(
                    f"sample {bad!r} holds NaN or infinite values; see --missing for what to do with gaps."
                )
