"""Attacks: one file each, imported here by name so that the list is easy to find."""

from antibackdoor.attacks import (
    adaptive_blend,
    adaptive_patch,
    all_to_all,
    badnets,
    blend,
    bpp,
    composite,
    dfst,
    several,
    sig,
    tact,
    wanet,
)
from antibackdoor.attacks.base import ATTACKS, Attack, Fitted, State

__all__ = [
    "ATTACKS",
    "Attack",
    "Fitted",
    "State",
    "adaptive_blend",
    "adaptive_patch",
    "all_to_all",
    "badnets",
    "blend",
    "bpp",
    "composite",
    "dfst",
    "several",
    "sig",
    "tact",
    "wanet",
]
