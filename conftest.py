"""Runs every code block of the README and the docs, in a folder with toy data and with hardly any training.

`python` blocks of a page share their names, as a reader would have it. Of `bash` blocks the lines that begin with
`antibackdoor` are run, in this process. `toml` blocks become the file that their first line names. `console` and `py`
blocks are not run here: the first install the package, the second belong to scripts that tests run as a whole.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser


def run_commands(example: Example) -> str | None:
    """What went wrong with the first line that did not end with status 0."""
    from typer.testing import CliRunner

    from antibackdoor.cli import app

    for line in example.parsed.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["antibackdoor"]:
            done = CliRunner().invoke(app, words[1:])
            if done.exit_code != 0:
                return f"{line}\nended with status {done.exit_code}:\n{done.output}"
    return None


def write_file(example: Example) -> None:
    """The block as a file in the working folder."""
    Path(example.parsed.splitlines()[0].removeprefix("# ").strip()).write_text(example.parsed)


def begin(namespace: dict[str, Any]) -> None:
    """A folder of its own with toy data, one epoch for every training, small networks, and registries to spoil."""
    from antibackdoor import models
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
    patch.setattr(engines, "Local", lambda *_, **__: engines.Here())  # other processes would not know of one epoch
    patch.setattr(models, "AUTO", {"image": "resnet18-w4", "series": "resnet18-w4"})
    for registry in (ATTACKS, DEFENSES, models.MODELS):
        patch.setattr(registry, "_entries", dict(registry._entries))
    write_images(Path("photos"), count=10)
    write_images(Path("new-photos"), count=2)


def end(namespace: dict[str, Any]) -> None:
    """As if nothing had been."""
    namespace["_patch"].undo()
    shutil.rmtree(namespace["_folder"], ignore_errors=True)


pytest_collect_file = Sybil(
    parsers=[
        PythonCodeBlockParser(),
        CodeBlockParser(language="bash", evaluator=run_commands),
        CodeBlockParser(language="toml", evaluator=write_file),
    ],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    setup=begin,
    teardown=end,
).pytest()
