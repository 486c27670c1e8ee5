"""The one error a user is meant to read, and the helper that guesses what they meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input or usage: one sentence that says what is wrong, where, and how to mend it.

    The command line prints the sentence and exits with status 2; it never shows a traceback for it.
    """


def unknown(what: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not in a closed list, with the nearest known name as a hint."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(choices)}."
    return InputError(f"unknown {what} {name!r}: {hint}")
