"""Runs every code block of the README and the docs, in a folder with toy data and with hardly any training.

`pytest -m long README.md docs` runs them; the fast suite leaves them out.

`python` blocks of a page share their names, as a reader would have it. Of `bash` blocks the lines that begin with
`antibackdoor` are run, in this process; so are the commands in the table of `questions.md`. `toml` blocks become the
file that their first line names. What is not run here, and why, stands in `tests/unit/test_docs.py`.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from sybil.sybil import SybilCollection


def run_commands(example: Example) -> str | None:
    """What went wrong with the first line that did not end with status 0."""
    for line in example.parsed.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["antibackdoor"] and (wrong := run_command(words[1:])):
            return wrong
    return None


def run_command(words: list[str]) -> str:
    """Run it in this process; what went wrong with it, if anything."""
    from typer.testing import CliRunner

    from antibackdoor.cli import app

    done = CliRunner().invoke(app, words)
    return f"{words}\nended with status {done.exit_code}:\n{done.output}" if done.exit_code else ""


ELSEWHERE = {
    "antibackdoor review run": "waits for a browser; tests/unit/test_review_browser.py is one",
    "antibackdoor bench experiments/first-results-series.toml --out results": "hours; that grid is planned instead",
    "antibackdoor scan poisoned --truth poisoned --out scanned": "a minute; tests/cli/test_scan.py runs it on less",
}
"""Commands of the table that are not run as they stand, and why."""


def commands_of_the_table(document: Document) -> Iterator[Region]:
    """Every command in a line of text, once; not the bare names of commands."""
    seen = set(ELSEWHERE)
    for found in re.finditer(r"`(antibackdoor [^`\s]+ [^`\n]+)`", document.text):
        if found[1] not in seen:
            seen.add(found[1])
            yield Region(found.start(), found.end(), found[1], run_commands)


def begin_table(namespace: dict[str, Any]) -> None:
    """What the table speaks of beside a folder of images: series, a grid."""
    begin(namespace)
    lines = ["\t".join(map(str, [k % 2, *(step * (1 + k % 2) % 8 for step in range(20))])) for k in range(40)]
    Path("ECG_TRAIN.tsv").write_text("\n".join(lines) + "\n")
    shutil.copy(Path(__file__).parent / "experiments" / "first-results-series.toml", "grid.toml")


def write_file(example: Example) -> None:
    """The block as a file in the working folder, named by its first line."""
    name = re.fullmatch(r"# (\S+\.toml)", example.parsed.splitlines()[0])
    assert name, "begin the block with the name of its file, as in `# grid.toml`"
    Path(name[1]).write_text(example.parsed)


def begin(namespace: dict[str, Any]) -> None:
    """A folder of its own with toy data, one epoch for every training, small networks, and registries to spoil."""
    from antibackdoor import demo, models
    from antibackdoor.attacks.base import ATTACKS
    from antibackdoor.bench import engines
    from antibackdoor.defenses.base import DEFENSES
    from antibackdoor.training.loop import Recipe, Steps
    from toy_files import write_images

    patch = namespace["_patch"] = pytest.MonkeyPatch()
    folder = namespace["_folder"] = Path(tempfile.mkdtemp())
    patch.chdir(folder)
    for recipe in (Recipe, Steps):
        patch.setattr(recipe, "epochs_for", lambda self, n: 1)
        patch.setattr(recipe, "passes_for", lambda self, n: 1)
    # Other processes would not know of one epoch.
    patch.setattr(engines, "Local", lambda *_, **__: engines.Here())
    patch.setattr(demo, "run_all", lambda commands, _: [run_command(words) for words in commands.values()])
    patch.setattr(models, "AUTO", {"image": "resnet18-w4", "series": "resnet18-w4"})
    for registry in (ATTACKS, DEFENSES, models.MODELS):
        patch.setattr(registry, "_entries", dict(registry._entries))
    write_images(Path("photos"), count=10)
    write_images(Path("new-photos"), count=2)


def end(namespace: dict[str, Any]) -> None:
    """As if nothing had been."""
    namespace["_patch"].undo()
    shutil.rmtree(namespace["_folder"], ignore_errors=True)


BLOCKS = [
    PythonCodeBlockParser(),
    CodeBlockParser(language="bash", evaluator=run_commands),
    CodeBlockParser(language="toml", evaluator=write_file),
]
PAGES = ["README.md", "docs/*.md", "docs/**/*.md"]
TABLE = "docs/questions.md"
pytest_collect_file = SybilCollection(
    [
        Sybil(parsers=BLOCKS, patterns=PAGES, excludes=[TABLE], setup=begin, teardown=end),
        Sybil(parsers=[*BLOCKS, commands_of_the_table], patterns=[TABLE], setup=begin_table, teardown=end),
    ]
).pytest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Most blocks train something."""
    for item in items:
        if item.path.suffix == ".md":
            item.add_marker(pytest.mark.long)
