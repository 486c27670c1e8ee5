"""Attacks: one file each, imported here by name so that the list is easy to find."""

from antibackdoor.attacks import (
    badnets,
    blend,
    dynamic,
    freqback,
    label_consistent,
    latent,
    narcissus,
    sig,
    timetrojan_de,
    timetrojan_fgsm,
    trojannn,
    tsba,
)
from antibackdoor.attacks.base import ATTACKS, Attack, Fitted, State

__all__ = [
    "ATTACKS",
    "Attack",
    "Fitted",
    "State",
    "badnets",
    "blend",
    "dynamic",
    "freqback",
    "label_consistent",
    "latent",
    "narcissus",
    "sig",
    "timetrojan_de",
    "timetrojan_fgsm",
    "trojannn",
    "tsba",
]
