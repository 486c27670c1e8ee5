"""Attacks: one file each, imported here by name so that the list is easy to find."""

from antibackdoor.attacks import badnets, blend, sig
from antibackdoor.attacks.base import ATTACKS, Attack, State

__all__ = ["ATTACKS", "Attack", "State", "badnets", "blend", "sig"]
