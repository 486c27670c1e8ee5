"""Writes the pages and figures that follow from the ledger: python docs/build_results.py"""

import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from antibackdoor.bench.declared import Figure, Results, figures_of, lines_of, number, tidy, wide
from antibackdoor.bench.grid import Grid, read_grid
from antibackdoor.bench.ledger import read_ledger
from antibackdoor.bench.standing import standing, stands
from antibackdoor.bench.tables import detection_table, markdown, table
from antibackdoor.bench.verdicts import calibrate, confidences, counts, missed, told, verdicts
from antibackdoor.report.svg import chart

ROOT = Path(__file__).resolve().parent.parent

HEAD = """# First results

Made from the ledger by `python docs/build_results.py`; do not edit. Every row follows from `results/*/*.json`, one file
a cell, with its settings, seed, versions, commit and history; `antibackdoor bench experiments/NAME.toml --out
results/NAME` runs what is missing (the grids of attacks and of the jury on series share
`results/first-results-series`). Figures are per cent, mean ± standard deviation over n seeds, last epoch. Excess ASR is
the attack success rate minus how often the same model answers the target class on the same samples without the trigger.
Cells were run in float32 or, where the processor has it, in bfloat16; each says in which, and close to a method's
limits that alone can turn an outcome.

What is missing here was not run yet: these are the first cells of a larger plan, at a scale that two processor cores
carry. One seed says little, and rows with n = 1 say so.
"""

PARTS = {
    "first-results-series": "## Time series\n\n1-D ResNet-18 of width 16, target class 0 (composite: 2; all_to_all: "
    "each next one). At a rate of 0 nothing is poisoned: these rows show what a trigger does by itself to a model of "
    "clean data, as an adversarial example does. No defense of a training set can undo that.",
    "attacks-images": "## Attacks on images\n\nNo defense: does the attack bite? 10,000 random training images, the "
    "full test sets, WideResNet-16-1 (DLP's network), 10 epochs of batches of 64 (about 1,560 steps), no augmentation; "
    "target class 0 (composite: 2 on CIFAR-10; sig on GTSRB: 2; all_to_all: each next one). The papers train 50,000 "
    "images for 100 epochs. The adaptive attacks and the low rates are 50 to 150 samples here; what stays under its "
    "gate counts for nothing.",
    "first-results-cifar10": "## CIFAR-10, small scale\n\n20,000 training images, test set, ResNet-18 of width 16.",
}

REPRODUCED = """# What we could and could not reproduce

Made from the ledger by `python docs/build_results.py`; do not edit.

- E2ABL: Jiang, Ma, Erfani, Li, Bailey, End-to-End Anti-Backdoor Learning on Images and Time Series, arXiv 2401.03215.
- DLP: Ying, Wu, DLP: towards active defense against backdoor attacks with decoupled learning process, 2023.

Everything was run at a reduced scale, stated above each table, on two processor cores: 10,000 of CIFAR-10's 50,000
images for 10 epochs in the place of 60, in a small network. A difference from a paper has that reason first.
`antibackdoor bench experiments/NAME.toml --profile paper` runs the papers' scale on a GPU.

**As published.** Poison is learned before what is clean. E2ABL's second head traps it, at next to no cost on
ResNet-34 ([speed](scale.md)), and its defense holds on CIFAR-10 under most attacks and on series under BadNets. Under
BadNets, in one seed, its parts matter in the direction that the paper says: the warm-up, control of what is taken
back, one network in the place of two, the place of the second head. DLP's entropy filter finds poison under all five
attacks, and its unlearning removes the trigger. The attacks themselves, on real samples (DLP's Fig. 3), are
[drawn here](attacks.md).

**Not as published.** E2ABL's ranking by loss drops after two epochs (profile `paper`) finds next to no poison in so
few steps; ours is by persistence. It does not stop SIG on series, TSBA on two sets of three, TimeTrojan on ECG5000 with
two seeds of three, Composite on CIFAR-10, nor any of five attacks on GTSRB, where it names another class or flags
little of its poison; Fine-Pruning and ABL stop neither TSBA nor TimeTrojan on ECG5000. DLP's unlearning destroys the
network under TrojanNN and Label-Consistent, its fine-tuning gets nowhere near the published accuracy in a thousand
steps (nor in 8,192), and clean-label poison (SIG) comes back through its pseudo-labels. Under BadNets, in one seed, the
fine-tuning removes the trigger without the unlearning, too, which in the paper it hardly does, and unlearning at the
end costs no accuracy. Why, as far as we tested it, stands row by row under the tables.

*Results* counts the places of a table that hold one. *Against the paper* is the mean difference in points, over the
places that the paper has, too, and whose attack takes without a defense.
"""

PAGES = {
    "e2abl-": ("reproduction/e2abl.md", "E2ABL: its tables and figures beside ours"),
    "dlp-": ("reproduction/dlp.md", "DLP: its tables and figures beside ours"),
    "attacks-": ("reproduction/attacks.md", "Attacks without a defense"),
    "": ("reproduction/ours.md", "Defenses side by side, and our own"),
}
"""The pages of tables, by how the names of their grids begin."""

READ = """A place reads `mean ± standard deviation ×seeds [as published]`, in per cent; ASR is the attack success
rate and CA the clean accuracy after the last epoch. "not run" is what it says; "excluded" gives the reason. The last
column tells whether the attack takes on an undefended model of the same scale: where it did not, the row says nothing
about a defense.
"""

JUDGED = """# How good is the verdict?

Made from the ledger by `python docs/build_results.py`; do not edit. Every cell of the default defense, and of the
quicker detector `witnesses`, keeps its verdict beside the truth, so that this can be counted. `scan` judges as the
default defense does, by a network of the width that most of these cells have. *False alarms* are clean sets said to be
poisoned. *Found* are sets said to be poisoned among those whose attack takes without a defense and poisons
1 % or more; of these, *right class* have exactly the attacked classes named, and *rate* are estimated within a factor
of 1.5. Sets whose attack does not take without a defense, or poisons less, are counted apart: there, a verdict of
"poisoned" is true, and its absence no loss.

The *confidence* of a verdict is the share of true ones among verdicts as clear as it, where half of all sets are
poisoned (`Calibration` in `verdict.py`: `margin` is how far the furthest class is on its way to being found attacked,
and `blind` the share of attacks that leave no trace). In the tables below the confidences of each data set come from
what the OTHER data sets give, where there are others; users get what all of them give.

All these sets were at hand while the rules of the default were made, and some rules were made after an attack counted
here had passed, or a clean set had not: the counts say how well the rules fit, not how well they carry over to others.
"""


OPEN = "e2abl-questions"
"""A grid with a page of its own."""


def results() -> str:
    """The page of the first results."""
    parts = [HEAD]
    for name, title in PARTS.items():
        records = list(read_ledger(ROOT / "results" / name).values())
        if not records:
            continue
        parts += [title, "", markdown(table(records))]
        found = detection_table(records)
        if len(found):
            parts += [
                "The partition at the end of training (as in the E2ABL paper's Table II), and the flags:",
                "",
                markdown(found),
            ]
    return "\n".join(parts)


def reproduced() -> dict[str, str]:
    """The page of what was and was not reproduced, those with its tables, and its figures, by file name."""
    ledger, files = Results(ROOT / "results"), {}
    explanations = tomllib.loads((ROOT / "docs" / "explanations.toml").read_text(encoding="utf-8"))["explanation"]
    found = list(itertools.chain(*(profiles(path, ledger) for path in sorted((ROOT / "experiments").glob("*.toml")))))
    summary = [REPRODUCED]
    for page, title in PAGES.values():
        grids = [grid for grid in found if page_of(grid) == page]
        parts, overview = [f"# {title}\n", READ], list[dict[str, str]]()
        for grid in grids:
            for spec in grid.tables:
                places = figures_of(grid, spec, ledger)
                compared = tidy(spec, places).dropna(subset=["mean", "published"])
                overview.append(
                    {
                        "table": f"[{titled(grid, spec)}]({page}#{slug(titled(grid, spec))})",
                        "results": f"{sum(bool(place.values) for place in places)} of {len(places)}",
                        "against the paper": differences(compared),
                    }
                )
                parts += table_part(grid, spec, places, explanations)
                if spec["id"] == SIDE_BY_SIDE:
                    parts += side_by_side(grid, ledger)
            for spec in grid.figures:
                name = f"figures/{spec['id']}{'' if grid.profile == 'cpu' else '-' + grid.profile}.svg"
                lines = lines_of(grid, spec, ledger)
                ran = any(lines.values())
                if ran:
                    files[name] = chart(lines, x_label=spec["x"])
                overview.append(
                    {
                        "table": f"[{titled(grid, spec)}]({page}#{slug(titled(grid, spec))})",
                        "results": "drawn" if ran else "not run",
                        "against the paper": "",
                    }
                )
                picture = f"![{spec['title']}](../{name})\n" if ran else "Not run.\n"
                parts += [f"## {titled(grid, spec)}\n", f"{scale(grid)}\n", f"{spec['printed']}\n", picture]
        files[page] = "\n".join(parts)
        summary += [f"## [{title}]({page})\n", markdown(pd.DataFrame(overview))]
    return {"reproduction.md": "\n".join(summary), **files}


def page_of(grid: Grid) -> str:
    """The page that a grid's tables stand on."""
    return next(page for start, (page, _) in PAGES.items() if grid.path.stem.startswith(start))


def titled(grid: Grid, spec: Mapping[str, Any]) -> str:
    """The heading of a table or figure, which a grid has under more than one profile."""
    return spec["title"] if grid.profile == read_grid(grid.path).profile else f"{spec['title']}, profile {grid.profile}"


def slug(title: str) -> str:
    """What a heading is linked by, as Markdown's own tables of contents have it."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def differences(compared: pd.DataFrame) -> str:
    """Mean difference from the published figures in accuracy and attack success, where the attack takes."""
    counted = compared[compared["undefended"].isin(["takes", ""])]
    told = []
    for kind in ("CA", "ASR"):
        mine = counted[counted["measure"].str.endswith(kind) & counted["difference"].notna()]
        if len(mine):
            told.append(f"{kind} {mine['difference'].mean():+.1f} ({len(mine)})")
    return ", ".join(told)


SIDE_BY_SIDE = "baselines"
"""The table whose rows are also counted by defense."""


def side_by_side(grid: Grid, ledger: Results) -> list[str]:
    """The grid's defenses, a row each, for images and for series."""
    found = list(stands(grid, ledger))
    parts = [
        "Over all of these sets, and seeds, whose attack takes: what is left of it beyond what the model confuses "
        "anyway, and how many points of clean accuracy less than the undefended model it has. Not all defenses were "
        "run on all sets.\n"
    ]
    for kind, title in (("image", "Images"), ("series", "Series")):
        parts += [f"{title}:\n", markdown(standing([one for one in found if one.kind == kind]))]
    return parts


ASKED = """# Open questions about E2ABL

Made from the ledger by `python docs/build_results.py`; do not edit. Each answer rests on the table below it: changes of
one thing at a time on UWave (937 series, 1-D ResNet-18 of width 16), with one seed so far, so that a few points say
nothing.
"""


def questions() -> dict[str, str]:
    """The page of open questions about E2ABL: answers, each above the table that it rests on."""
    ledger, tables = Results(ROOT / "results"), {}
    for path in sorted((ROOT / "experiments").glob("*-*.toml")):
        grid = read_grid(path)
        tables |= {spec["id"]: (grid, spec) for spec in grid.tables}
    parts = [ASKED]
    asked = tomllib.loads((ROOT / "docs" / "e2abl-questions.toml").read_text(encoding="utf-8"))
    for question in asked["question"]:
        parts += [f"## {question['title']}", question["answer"], ""]
        if "table" in question:
            grid, spec = tables[question["table"]]
            parts += [
                markdown(wide(spec, figures_of(grid, spec, ledger))),
                *([spec["note"], ""] if "note" in spec else []),
            ]
    return {"e2abl-questions.md": "\n".join(parts)}


def judged() -> dict[str, str]:
    """The page of verdicts, with its figure, by file name."""
    found = list(verdicts(Results(ROOT / "results")))
    parts, lines = [JUDGED], dict[str, list[tuple[float, float]]]()
    for by, title in (("jury", "The default defense"), ("witnesses", "`scan --detector witnesses`")):
        mine = [one for one in found if one.by == by]
        if mine:
            lines[by] = [(100 * one.mean, 100 * one.even) for one in told(mine)]
            blind, slope, even = calibrate(mine)
            parts += [
                f"## {title}\n",
                markdown(counts(mine)),
                "By their confidence, without attacks that do not take or poison less:\n",
                markdown(confidences(mine)),
                f"The calibration on all of them: blind {blind:.3f}, slope {slope:.1f}, even {even:.3f}.\n",
            ]
            if unseen := missed(mine):
                parts.append(f"Not found: {', '.join(unseen)}.\n")
    lines["as often as it says"] = [(50.0, 50.0), (100.0, 100.0)]
    figure = chart({"true answers, %": list(lines.items())}, x_label="confidence that was told, %")
    parts.append("![Share of true answers over the confidence that was told](figures/verdict.svg)\n")
    return {"verdict.md": "\n".join(parts), "figures/verdict.svg": figure}


def profiles(path: Path, ledger: Results) -> Iterator[Grid]:
    """The grid under its first profile, and under the others as far as something more of them was run."""
    first = read_grid(path)
    if path.stem == OPEN or not (first.tables or first.figures):
        return
    yield first
    known = set(ledger.records) & {cell.name() for cell in first.cells()}
    for name in tomllib.loads(path.read_text(encoding="utf-8")).get("profile", {}):
        grid = read_grid(path, name)
        if name != first.profile and {cell.name() for cell in grid.cells()} & set(ledger.records) - known:
            yield grid


def scale(grid: Grid) -> str:
    """How a grid's profile differs from the paper."""
    return f"Scale: {grid.description}." if grid.description else ""


def table_part(
    grid: Grid, spec: Mapping[str, Any], places: list[Figure], explanations: list[dict[str, Any]]
) -> list[str]:
    """A table, and, row by row, how it differs from the published one."""
    rows = wide(spec, places)
    ran = (~rows[rows.columns[len(spec["rows"]) : -1]].map(unrun)).any(axis=1)
    parts = [f"## {titled(grid, spec)}\n", f"{scale(grid)}\n", *([markdown(rows[ran])] if ran.any() else [])]
    if not ran.all():
        left = [" ".join(row) for row in rows[~ran][list(spec["rows"])].to_numpy().tolist()]
        parts.append(f"Not run: {', '.join(left)}.\n" if ran.any() else "Not run.\n")
    if spec.get("note"):
        parts.append(f"{spec['note']}\n")
    compared = tidy(spec, places).dropna(subset=["mean", "published"])
    if len(compared):
        names = [*spec["rows"], *spec.get("columns", [])]
        rows = compared[[*names, "measure"]].copy()
        for name in ("mean", "published", "difference"):
            rows[name] = [number(value) for value in compared[name]]
        rows["explanation"] = [
            explanation(explanations, spec["id"], {**row, "profile": grid.profile}, place["undefended"])
            for row, (_, place) in zip(rows.to_dict("records"), compared.iterrows(), strict=True)
        ]
        parts += ["Against the published figures:\n", markdown(rows)]
    return parts


def unrun(place: str) -> bool:
    """Whether a place of a table holds neither a result nor a reason."""
    return place == "" or place.startswith("not run")


def explanation(explanations: list[dict[str, Any]], name: str, row: dict[Any, Any], undefended: str) -> str:
    """What the undefended model says of an attack that does not take, and the first explanation that fits the row."""
    texts = [] if undefended in {"takes", ""} else [undefended]
    for entry in explanations:
        wanted = entry.get("where", {})
        if entry["table"] in {name, "*"} and all(row.get(key) == value for key, value in wanted.items()):
            texts.append(str(entry["text"]))
            break
    return "; ".join(texts)


def pages() -> dict[str, str]:
    """Everything that this script writes, by its place under docs/."""
    return {"results.md": results(), **reproduced(), **judged(), **questions()}


if __name__ == "__main__":
    for name, text in pages().items():
        (ROOT / "docs" / name).parent.mkdir(exist_ok=True)
        (ROOT / "docs" / name).write_text(text, encoding="utf-8")
