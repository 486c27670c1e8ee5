"""Image files -> Data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from torch import Tensor

from antibackdoor.data.core import Splits
from antibackdoor.data.decoding import EXTENSIONS, Encoded, Size, Split, read_images
from antibackdoor.data.file_lists import FileList
from antibackdoor.data.labels import number


class ImageFiles(Split):
    """One split, an image a file."""

    unreadable = "files in {} cannot be read as images"

    def __init__(self, files: FileList):
        self.files, self.ids = files, files.ids

    def state(self) -> Iterator[object]:
        """Names, sizes and times of the files."""
        return self.files.state()

    def encoded(self) -> Iterator[Encoded]:
        """The files, each to be opened in the thread that decodes it."""
        return (Encoded(partial(self._open, row)) for row in range(len(self.ids)))

    def _open(self, row: int) -> IO[bytes]:
        return self.files.readable(row, EXTENSIONS, "an image file").open("rb")

    def numbered(self, rows: list[int], classes: Sequence[str] | None) -> tuple[Tensor, list[str]]:
        """A class is there where an image of it can be read."""
        names = self.files.names
        return number([names[row] for row in rows], [self.ids[row] for row in rows], classes)


def load_images(
    lists: Sequence[FileList],
    where: Path,
    *,
    image_size: Size = None,
    skip_unreadable: bool = False,
    memory_map: bool | None = False,
) -> Splits:
    """The training set and, if there are two lists, the test set.

    All images become RGB of one size: `image_size` squared (or a width and a height) or, if None, the training set's
    most common size with each side capped at 64 pixels. memory_map: see `Pack`. Raises InputError for files that are no
    readable images (all counted, the first five named) unless `skip_unreadable`.
    """
    return read_images([ImageFiles(files) for files in lists], where, image_size, skip_unreadable, memory_map)
