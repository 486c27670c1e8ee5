"""What was found about a class, in words: what it means first, the numbers in brackets."""

from __future__ import annotations

from typing import Any

from antibackdoor.intervals import lower
from antibackdoor.training.groups import FEW


def told_of(name: str, found: dict[str, Any], limits: dict[str, float]) -> list[str]:
    """What was found about one class: what it means first, the numbers in brackets."""
    told = _told_of_divisions(name, found, limits)
    mixed = "many classes, as poison does" if found["alike"] < limits["alike"] else "one class, as a rare kind does"
    look = (
        f"They look like {mixed} (what they are taken for is {found['alike']:.0%} off the mix of all other classes; "
        f"{limits['alike']:.0%} or more is one kind)."
    )
    nearer = "nearer" if found["kin"] < found["below"] else "not much nearer"
    kin = (
        f"What they are taken for is {nearer} to that mix than to what the rest of {name!r} is taken for "
        f"({found['kin']:.2f} of that distance; {found['below']:.2f} or more is of its class)."
    )
    if found["together"]:
        like_poison = found["alike"] < limits["alike"] and (found["early"] > 0.5 or found["kin"] < found["below"])
        early = (
            "They were learned early, as poison is "
            f"(half of them earlier than {found['early']:.0%} of all samples; more than 50% is early)."
        )
        if not like_poison:
            why = [
                "That would be said of clean samples, too, but the model leaves next to no doubt about all of these "
                f"(clarity {found['denial']:.1f}; from {limits['certain']:.1f} on they are poison, or mislabeled)."
            ]
        elif found["together"] < FEW:
            why = [early, kin]
        else:
            why = [early if found["early"] > 0.5 else kin]
        told += [
            f"A model that learned from trusted samples denies the label {name!r} to a group of samples that lie "
            f"together ({found['together']}), and not to the others of the class.",
            look,
            *why,
        ]
    elif found["n"]:
        counts = f"({found['count']} of the {found['n']} that it was not shown)"
        few = lower(found["count"], found["n"]) <= limits["acquittal"]
        if few and not found["apart"]:
            told.append(
                f"A model that learned from trusted samples takes few samples labeled {name!r} for other classes, as "
                f"in clean data {counts}."
            )
        elif not few:
            when = (
                "early, as poison is"
                if found["early"] > 0.5
                else "late, and are not what they are labeled in the end either, when odd but clean samples are known"
                if found["stayed"]
                else "late, as odd but clean samples are"
            )
            told += [
                f"A model that learned from trusted samples takes more samples labeled {name!r} for other classes, "
                f"with confidence, than mistakes explain {counts}.",
                f"They were learned {when} (half of them earlier than {found['early']:.0%} of all samples; more than "
                "50% is early).",
                look,
                *([kin] if found["stayed"] or (found["count"] < FEW and found["early"] > 0.5) else []),
            ]
    return told or ["No class falls into two: not when it is learned, not mixed, not for models that never saw it."]


def told_of_hold(names: list[str], hold: dict[str, int]) -> list[str]:
    """That what was found in the classes `names` had a hold on the model, if it had."""
    if not hold["holds"]:
        return []
    led = f"{hold['led']} of {hold['asked']}"
    others = f"{hold['others_led']} of {hold['others_asked']}"
    return [
        f"Mixed into other samples, what these have in common led the model to {' or '.join(map(repr, names))} ({led}; "
        f"samples of other classes did no more than {others}); from then on it learned that this tells nothing."
    ]


def _told_of_divisions(name: str, found: dict[str, Any], limits: dict[str, float]) -> list[str]:
    """By what a class is divided, and what the model says of those set apart by it."""
    meaning = {
        "ease": (
            f"Some samples labeled {name!r} lie together and were learned apart from the others of the class",
            "a shallow model came to know all of them sooner, or all of them later.",
        ),
        "bond": (
            f"Something other than what they show ties some samples to the label {name!r}",
            f"averaged with samples of other classes they are still taken for {name!r}, and others of it are not.",
        ),
        "division": (
            f"Some samples labeled {name!r} look like samples of another class",
            "models that never saw this label are sure of another for them, and not for the others of the class.",
        ),
    }
    told = []
    for division, (what, why) in meaning.items():
        if found[division] < limits[division]:
            continue
        agreed = found["agreed"].get(division)
        weak = agreed is not None and found[division] < limits["plain"] * limits[division]
        freed = weak and agreed >= 0.5
        apart = "" if freed or not found["apart"] else f" ({found['apart']} are set apart)"
        told.append(f"{what}{apart}: {why}")
        if weak:
            told.append(
                f"A model that never learned their label {'agrees with' if freed else 'denies'} it (gives it "
                f"{agreed:.0%} in the mean; from 50% on they count as a kind of their own, unless the class is divided "
                f"{limits['plain']:.1f} times as clearly as is beyond doubt)."
            )
    return told
