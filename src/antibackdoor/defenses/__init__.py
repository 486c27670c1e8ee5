"""Defenses: one file each, imported here by name so that the list is easy to find."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from antibackdoor.defenses import abl, anp, dbr, dlp, e2abl, fine_pruning, harvey, jury, mcr, nad, none
from antibackdoor.defenses.base import DEFENSES, Defense, Outcome, Partition, check_given
from antibackdoor.errors import unknown
from antibackdoor.options import build

AUTO = "jury"
"""What `auto` means."""


def make_defense(name: str, settings: Mapping[str, Any] | None = None) -> Defense:
    """A defense from "name" or "name:profile" and settings that override the profile's.

    Raises InputError for an unknown name, profile or setting, with the nearest known one.
    """
    name, _, profile = (AUTO if name == "auto" else name).partition(":")
    cls = DEFENSES[name].make
    if profile and profile not in cls.profiles:
        raise unknown(f"profile of {name}", profile, cls.profiles)
    base = cls.profiles[profile] if profile else {}
    return build(cls, settings or {}, f"defense {name}", base=base)


__all__ = [
    "DEFENSES",
    "Defense",
    "Outcome",
    "Partition",
    "abl",
    "anp",
    "check_given",
    "dbr",
    "dlp",
    "e2abl",
    "fine_pruning",
    "harvey",
    "jury",
    "make_defense",
    "mcr",
    "nad",
    "none",
]
