"""What the site takes from the code while it is built: tables of methods, helps of commands, examples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from antibackdoor.cli import app
from antibackdoor.cli.frame import ORDER
from antibackdoor.listing import listing


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the places that pages leave open."""
    if "<!-- listing -->" in markdown:
        markdown = markdown.replace("<!-- listing -->", tables())
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", helps())
    markdown = markdown.replace("<!-- formats -->", formats())
    return re.sub(
        r"<!-- example (\S+) -->", lambda found: example(Path(page.file.abs_src_path).parent / found[1]), markdown
    )


def formats() -> str:
    """The README's table of what can be read, which stands there only."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    return readme.split("In place of `photos`:\n\n")[1].split("\n\n")[0]


def tables() -> str:
    """One table for each registry, with paper and needs."""
    parts = []
    for group, rows in listing(None, None).items():
        parts += [f"## {group.capitalize()}", "", "| name | kinds | what | needs |", "|---|---|---|---|"]
        for row in rows:
            what = row["description"] + (f" *{row['paper']}*" if row.get("paper") else "")
            cells = (f"`{row['name']}`", ", ".join(row["kinds"]), what, ", ".join(row.get("needs") or []) or "–")
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def helps() -> str:
    """The help text of every command."""
    parts = []
    for command in ORDER:
        text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}, prog_name="antibackdoor").output
        parts += [f"## {command}", "", "```text", text.strip("\n"), "```", ""]
    return "\n".join(parts)


def example(path: Path) -> str:
    """A script of `# %%` cells as a page: comments of markdown cells as text, everything else as code."""
    parts = []
    for cell in re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        kind, _, body = cell.partition("\n")
        if "[markdown]" in kind:
            parts.append(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))
        else:
            parts.append(f"```py\n{body.strip()}\n```")
    return "\n\n".join(parts)
