"""Settings under which the contract tests look at each attack: small, and where it must bite, strong."""

from __future__ import annotations

from typing import Any

TINY: dict[str, dict[str, Any]] = {}
"""What makes an attack quick to fit on the toy sets; none: as it is."""
BITING: dict[str, dict[str, Any]] = {
    "adaptive_blend": {"rate": 0.1, "alpha": 0.3, "alpha_train": 0.25, "strength": 1.5, "strength_train": 1.2},
    "adaptive_patch": {"rate": 0.2, "opacity": 0.9, "size": 4, "share": 0.05},
    "all_to_all": {"rate": 0.4, "share": 0.2, "size": 5},
    "badnets": {"rate": 0.15, "share": 0.1},
    "blend": {"rate": 0.1, "alpha": 0.3, "strength": 1.0},
    "bpp": {"rate": 0.2, "levels": 3},
    "composite": {"rate": 0.2, "cover": 0.2, "target": 3},
    "dfst": {"rate": 0.15},
    "several": {"rate": 0.3, "size": 5, "share": 0.15},
    "sig": {"rate": 0.24, "frequency": 5, "delta": 150, "amplitude": 3.0},
    "tact": {"rate": 0.15, "cover": 0.2, "size": 5, "share": 0.1},
    "wanet": {"rate": 0.2, "cover": 0.0, "strength": 4.0, "stretch": 0.1},
}  # fmt: skip
"""Strong settings: the toy classes are learned so fast that a weak trigger has nothing to offer."""
FLOOR: dict[str, float] = {}
"""Least attack success rate under plain training where it is not 0.9."""
