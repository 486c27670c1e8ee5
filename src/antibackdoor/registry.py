"""Name -> method, with what `list` tells about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from antibackdoor.errors import unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered method; `description` is the first line of its docstring."""

    name: str
    make: T
    description: str
    paper: str
    kinds: tuple[str, ...]


class Registry(Generic[T]):
    """A closed list of methods of one sort (`what`: "attack", "defense", "model" ...)."""

    def __init__(self, what: str):
        self.what = what
        self._entries: dict[str, Entry[T]] = {}

    def register(
        self, name: str, *, paper: str = "", kinds: tuple[str, ...] = ("image", "series")
    ) -> Callable[[Any], Any]:
        """Class or function decorator; a name taken twice or a missing docstring is a programming error."""

        def add(make: Any) -> Any:
            if name in self._entries:
                raise RuntimeError(f"{self.what} {name!r} is registered twice")
            if not (make.__doc__ or "").strip():
                raise RuntimeError(f"{self.what} {name!r} has no docstring")
            description = make.__doc__.strip().splitlines()[0]
            self._entries[name] = Entry(name, make, description, paper, kinds)
            return make

        return add

    def __getitem__(self, name: str) -> Entry[T]:
        if name not in self._entries:
            raise unknown(self.what, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))
