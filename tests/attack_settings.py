"""Settings under which the contract tests look at each attack: small, and where it must bite, strong."""

from __future__ import annotations

from typing import Any

from antibackdoor.training.loop import Recipe


def quick(epochs: int, learning_rate: float = 0.05) -> Recipe:
    """Batches of 16, no floor of steps, no augmentation."""
    return Recipe(
        epochs=epochs, min_steps=0, batch_size=16, learning_rate=learning_rate, weight_decay=0, augment="none"
    )


TINY: dict[str, dict[str, Any]] = {
    "dynamic": {"recipe": quick(1), "masking": quick(1, 3e-3), "joint": quick(1, 3e-3), "width": 8, "density": 0.1},
    "freqback": {"recipe": quick(1)},
    "label_consistent": {"recipe": quick(1), "robust_steps": 1, "steps": 3},
    "latent": {"recipe": quick(1), "optimization": quick(1, 0.3)},
    "narcissus": {"recipe": quick(1), "optimization": quick(2, 0.3)},
    "timetrojan_de": {"recipe": quick(1), "alternation": quick(1), "population": 4, "generations": 2, "probe": 8},
    "timetrojan_fgsm": {"recipe": quick(1), "alternation": quick(1)},
    "trojannn": {"recipe": quick(1), "optimization": quick(1, 0.3)},
    "tsba": {"recipe": quick(1), "joint": quick(1, 3e-3), "width": 8},
}
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
    "dynamic": {"rate": 0.2, "recipe": quick(3), "masking": quick(2, 3e-3), "joint": quick(8, 3e-3)},
    "freqback": {"rate": 0.15, "recipe": quick(3)},
    "label_consistent": {"rate": 0.24, "epsilon": 100, "size": 5, "share": 0.15, "recipe": quick(3), "steps": 5},
    "latent": {"rate": 0.2, "size": 5, "recipe": quick(3), "optimization": quick(3, 0.3)},
    "narcissus": {"rate": 0.24, "epsilon": 120, "spread": 3.0, "amplify": 1.0, "recipe": quick(3),
                  "optimization": quick(6, 0.3)},
    "several": {"rate": 0.3, "size": 5, "share": 0.15},
    "sig": {"rate": 0.24, "frequency": 5, "delta": 150, "amplitude": 3.0},
    "tact": {"rate": 0.15, "cover": 0.2, "size": 5, "share": 0.1},
    "timetrojan_de": {"rate": 0.15, "share": 0.15, "recipe": quick(3), "alternation": quick(2)},
    "timetrojan_fgsm": {"rate": 0.15, "eta": 3.0, "share": 0.15, "portion": 0.3, "recipe": quick(3),
                        "alternation": quick(4, 0.02)},
    "trojannn": {"rate": 0.2, "size": 5, "share": 0.2, "recipe": quick(3), "optimization": quick(3, 0.3)},
    "tsba": {"rate": 0.15, "strength": 0.25, "recipe": quick(3), "joint": quick(5, 3e-3)},
    "wanet": {"rate": 0.2, "cover": 0.0, "strength": 4.0, "stretch": 0.1},
}  # fmt: skip
"""Strong settings: the toy classes are learned so fast that a weak trigger has nothing to offer."""
FLOOR: dict[str, float] = {"dynamic": 0.7, "narcissus": 0.7, "timetrojan_fgsm": 0.7}
"""Least attack success rate under plain training where it is not 0.9."""
LEFT_OUT = {(name, "series") for name in ("label_consistent", "latent", "trojannn")} | {
    (name, "image") for name in ("dynamic", "freqback", "narcissus")
}
"""Not shown to bite: every attack that trains a network costs seconds, so it shows it on one sort of data."""
