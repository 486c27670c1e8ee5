"""The one error a user is meant to read, and the helper that guesses what they meant."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Sequence
from importlib import import_module

LONGEST = 2000
"""Characters of a sentence, at most; names and what a decoder says of a file come from whoever made the data."""


def visible(text: str) -> str:
    """Text on one line with everything that cannot be seen spelled out.

    Line breaks, terminal escapes, marks that reverse the reading direction and broken Unicode become escapes such as
    `\\x1b`, so that a name looks like what it is and does nothing where it is printed.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class InputError(ValueError):
    """Bad input or usage: one sentence that says what is wrong, where, and how to mend it.

    The command line prints the sentence and exits with status 2; it never shows a traceback for it. Whatever names the
    sentence quotes, it is one line of visible text; the middle of one that is too long is left out.
    """

    def __init__(self, sentence: str):
        shown = visible(sentence)
        half = LONGEST // 2
        super().__init__(shown if len(shown) <= LONGEST else f"{shown[:half]} ... {shown[-half:]}")


class LeftOut(UserWarning):
    """Something that lies among the data was not read. `Splits.notes` has the sentence, too; commands print it."""


def leave_out(bad: Sequence[str], total: int, what: str, *, skip: bool) -> None:
    """Refuse what cannot be read, `bad` (names and reasons) of `total`, or say that it is left out (`skip`).

    what: how the sentence goes on after their number. All are counted, five are named.
    """
    if not bad:
        return
    listed = "; ".join(bad[:5]) + ("; ..." if len(bad) > 5 else "")
    sentence = f"{len(bad)} of {total} {what} ({listed})"
    if not skip:
        raise InputError(f"{sentence}; mend or remove them, or leave them out with --skip-unreadable.")
    warnings.warn(visible(f"{sentence}; they are left out."), LeftOut, stacklevel=5)


def require(sentence: str, *packages: str) -> None:
    """Refuse to go on, with this sentence, where one of these packages cannot be imported."""
    try:
        for package in packages:
            import_module(package)
    except ImportError:
        raise InputError(sentence) from None


SHOWN = 60
"""Names of a list that an error spells out."""


def unknown(what: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not in a closed list, with the nearest known name as a hint."""
    choices = sorted(known)
    begun = [choice for choice in choices if choice.startswith(name)] if len(name) > 1 else []
    near = begun if len(begun) == 1 else difflib.get_close_matches(name, choices, n=1)
    some = ", ".join(choices[:SHOWN]) + (f" and {len(choices) - SHOWN} more" if len(choices) > SHOWN else "")
    hint = f"did you mean {near[0]!r}?" if near else f"known: {some}." if choices else "there are none."
    return InputError(f"unknown {what} {name!r}: {hint}")
