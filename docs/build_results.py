"""Writes docs/results.md from the ledger: python docs/build_results.py"""

from pathlib import Path

from antibackdoor.bench.ledger import read_ledger
from antibackdoor.bench.tables import detection_table, markdown, table

ROOT = Path(__file__).resolve().parent.parent

HEAD = """# First results

Made from the ledger by `python docs/build_results.py`; do not edit. Every row follows from `results/*/*.json`, one file
a cell, with its settings, seed, versions, commit and history; `antibackdoor bench experiments/NAME.toml --out
results/NAME` runs what is missing. Figures are per cent, mean ± standard deviation over n seeds, last epoch. Excess ASR
is the attack success rate minus how often the same model answers the target class on the same samples without the
trigger.

What is missing here was not run yet: these are the first cells of a larger plan, at a scale that two processor cores
carry. One seed says little, and rows with n = 1 say so.
"""

PARTS = {
    "first-results-series": "## Time series\n\n1-D ResNet-18 of width 16, target class 0, 10 % of the set poisoned.",
    "first-results-cifar10": "## CIFAR-10, small scale\n\n20,000 training images, test set, ResNet-18 of width 16.",
}


def results() -> str:
    """The whole page."""
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


if __name__ == "__main__":
    (ROOT / "docs" / "results.md").write_text(results(), encoding="utf-8")
