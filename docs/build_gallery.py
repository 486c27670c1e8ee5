"""Writes docs/attacks.md and docs/gallery/: what every attack does to real samples.

    python docs/build_gallery.py [--data-root DIR] [--kept DIR] [--only NAME ...]

A picture for each image set: columns are attacks, rows a clean sample, the poisoned one and their amplified difference.
A drawing for each set of series: the clean curve under the poisoned one. Attacks that train something are fitted with a
small surrogate on a part of the set, and kept in `--kept`, so that a second call is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from antibackdoor.attacks import ATTACKS, Attack, Fitted
from antibackdoor.bench.cell import subset
from antibackdoor.bench.poisoned import fitted
from antibackdoor.data.core import Data
from antibackdoor.data.load import load
from antibackdoor.errors import InputError
from antibackdoor.options import values
from antibackdoor.training.job import make_fabric
from antibackdoor.training.loop import Recipe

ROOT = Path(__file__).resolve().parent
IMAGES = ("cifar10", "gtsrb", "imagenette")
SERIES = ("ecg5000", "uwave", "arabic_digits")
PART = 2000
"""Samples that trained attacks are fitted on: a picture needs no strong trigger."""
AMPLIFIED = 5
SIDE, GAP, LABEL = 64, 4, 24
WIDTH, HEIGHT, COLUMNS = 220, 90, 4
HEAD = """# Attacks

Made by `python docs/build_gallery.py`; do not edit. An attack poisons a training set once; whoever trains on it gets a
backdoor. They are here to measure defenses with. `antibackdoor list attacks NAME` shows the settings of one,
`antibackdoor poison DATA --attack NAME --out DIR` mounts it.

| name | what it does | images | series | labels | cover | needs | paper |
|---|---|---|---|---|---|---|---|"""
TAIL = f"""
Labels "true": a clean-label attack. Cover: samples that carry the trigger, or something like it, under their true
label, as a share of the whole set. Needs training: the attack trains a surrogate or a generator first. Three are for
series only, since their ideas have names of their own on images: a few moved pixels are what `trojannn` does, a
generator is `dynamic`.

## Images

Clean sample, poisoned sample, and their difference times {AMPLIFIED} around gray.
"""
SETTINGS: dict[str, dict[str, Any]] = {"composite": {"cover": 0.0}}


def attack_for(name: str, target: int) -> Attack:
    """An attack as it comes, but with little training where it trains."""
    make = ATTACKS[name].make
    attack: Attack = make(**{"target": target, **SETTINGS.get(name, {})})
    short = {
        field.name: dataclasses.replace(getattr(attack, field.name), epochs=3, min_steps=60)
        for field in dataclasses.fields(attack)
        if isinstance(getattr(attack, field.name), Recipe)
    }
    return dataclasses.replace(attack, **short)


def example(name: str, data: Data, kept: Path) -> tuple[torch.Tensor, torch.Tensor, int] | str:
    """A sample before and after, decoded, and its length; or why there is none."""
    target = 1 if name == "all_to_all" else 0
    attack = attack_for(name, target)
    try:
        attack.check(data)
        part = subset(data, PART if isinstance(attack, Fitted) else None)
        state = fitted(attack, part, seed=0, victim="resnet18-w8", fabric=make_fabric("cpu"), kept=kept)
        every = torch.arange(len(data))
        targets = attack.leads_to(data.y, every, len(data.spec.classes))
        rows = attack.candidates(data.y, targets, "poison").nonzero().flatten()
        if len(rows) == 0:
            return "no sample of a class that it starts from"
        row = rows[len(rows) // 3 : len(rows) // 3 + 1]
        after = data.spec.decode(attack.make(data, row, state, "poison"))[0]
    except InputError as problem:
        return str(problem)
    length = data.spec.shape[-1] if data.lengths is None else int(data.lengths[row])
    return data.spec.decode(data.x[row])[0], after, length


def picture(examples: dict[str, tuple[torch.Tensor, torch.Tensor, int]]) -> Image.Image:
    """Rows: clean, poisoned, difference; one column an attack, its name above."""
    font = ImageFont.load_default(size=9)
    step = SIDE + GAP
    sheet = Image.new("RGB", (step * len(examples) + GAP, LABEL + 3 * step), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, (before, after, _)) in enumerate(examples.items()):
        left = GAP + column * step
        draw.multiline_text((left, 1), name.replace("_", "\n", 1), fill="black", font=font, spacing=1)
        for row, x in enumerate((before, after, (0.5 + AMPLIFIED * (after - before)).clamp(0, 1))):
            pixels = x.mul(255).round().byte().permute(1, 2, 0).numpy()
            tile = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(tile, (left, LABEL + row * step))
    return sheet


def drawing(examples: dict[str, tuple[torch.Tensor, torch.Tensor, int]]) -> str:
    """An SVG: for each attack the first channel, clean in gray and poisoned in color."""
    rows = -(-len(examples) // COLUMNS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {COLUMNS * WIDTH} {rows * HEIGHT}" '
        'font-family="sans-serif" font-size="9" fill="none" stroke-width="1">'
    ]
    for number, (name, (before, after, length)) in enumerate(examples.items()):
        left, top = number % COLUMNS * WIDTH, number // COLUMNS * HEIGHT
        both = torch.stack([before[0, :length], after[0, :length]])
        low, high = float(both.min()), float(both.max())
        parts.append(f'<text x="{left + 6}" y="{top + 10}" fill="#000">{name}</text>')
        for curve, color in zip(both, ("#9a9a9a", "#c2410c"), strict=True):
            points = " ".join(
                f"{left + 6 + (WIDTH - 12) * t / max(length - 1, 1):.1f},"
                f"{top + HEIGHT - 8 - (HEIGHT - 24) * (float(value) - low) / max(high - low, 1e-9):.1f}"
                for t, value in enumerate(curve)
            )
            parts.append(f'<polyline points="{points}" stroke="{color}"/>')
    return "\n".join([*parts, "</svg>\n"])


def page(left_out: dict[str, dict[str, str]]) -> str:
    """docs/attacks.md."""
    lines = [HEAD]
    for entry in ATTACKS:
        attack = entry.make()
        kinds = ["yes" if kind in entry.kinds else "no" for kind in ("image", "series")]
        settings = values(attack)
        cover = f"{settings['cover']:.1%}" if settings["cover"] else ""
        needs = "training" if isinstance(attack, Fitted) else ""
        row = [entry.name, entry.description, *kinds, "true" if attack.clean_label else "changed", cover, needs]
        lines.append("| " + " | ".join([*(text.replace("|", "\\|") for text in row), entry.paper]) + " |")
    lines.append(TAIL)
    for name in (*IMAGES, *SERIES):
        if name == SERIES[0]:
            lines += [
                "## Series",
                "",
                "The first channel of a clean series in gray, and of the poisoned one in color.",
                "",
            ]
        ending = "webp" if name in IMAGES else "svg"
        if (ROOT / "gallery" / f"{name}.{ending}").is_file():
            lines += [f"### {name}", "", f"![Every attack on {name}](gallery/{name}.{ending})", ""]
        lines += [f"Left out, {attack}: {reason}" for attack, reason in left_out.get(name, {}).items()]
        lines += [""] if left_out.get(name) else []
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Read the command line, make the figures, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--kept", type=Path, default=Path(".gallery"), help="where trained attacks are kept")
    parser.add_argument("--only", nargs="*", default=[], help="data sets; none: all")
    args = parser.parse_args()
    left_out: dict[str, dict[str, str]] = {}
    (ROOT / "gallery").mkdir(exist_ok=True)
    for name in (*IMAGES, *SERIES):
        if args.only and name not in args.only:
            continue
        data = load(name, data_root=args.data_root).train
        found = {e.name: example(e.name, data, args.kept) for e in ATTACKS if data.spec.kind in e.kinds}
        left_out[name] = {attack: reason for attack, reason in found.items() if isinstance(reason, str)}
        examples = {attack: shown for attack, shown in found.items() if not isinstance(shown, str)}
        if name in IMAGES:
            picture(examples).save(ROOT / "gallery" / f"{name}.webp", quality=80, method=6)
        else:
            (ROOT / "gallery" / f"{name}.svg").write_text(drawing(examples), encoding="utf-8")
        print(name, len(examples), left_out[name])
    (ROOT / "attacks.md").write_text(page(left_out), encoding="utf-8")


if __name__ == "__main__":
    main()
