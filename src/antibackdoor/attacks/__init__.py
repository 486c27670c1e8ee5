"""Attacks: one file each, imported here by name so that the list is easy to find."""

from antibackdoor.attacks import badnets, blend, sig
from antibackdoor.attacks.base import ATTACKS, Attack, Fitted, State

__all__ = ["ATTACKS", "Attack", "Fitted", "State", "badnets", "blend", "sig"]
