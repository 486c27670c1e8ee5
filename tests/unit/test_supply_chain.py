"""What CI installs is locked: every requirement by version and hash, from the package index and nowhere else."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / ".ci" / "requirements.txt").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def wanted() -> list[Requirement]:
    """The package's own requirements, those of the extras that CI installs, and the build backend."""
    extras, found = ["dev", "docs", "audit"], list(PROJECT["project"]["dependencies"])
    found += PROJECT["build-system"]["requires"]
    for extra in extras:
        for text in PROJECT["project"]["optional-dependencies"][extra]:
            requirement = Requirement(text)
            if requirement.name == "antibackdoor":
                extras += sorted(requirement.extras)
            else:
                found.append(text)
    return [Requirement(text) for text in found]


def test_every_requirement_is_locked_within_its_range() -> None:
    pinned = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", LOCK, flags=re.MULTILINE))
    for requirement in wanted():
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not locked; make the lock again, see docs/trust.md"
        assert requirement.specifier.contains(pinned[name], prereleases=True), requirement


def test_every_locked_package_has_a_hash_and_no_other_source() -> None:
    lines = [line for line in LOCK.splitlines() if line.strip() and not line.startswith("#")]
    for number, line in enumerate(lines):
        pin = re.fullmatch(r"[A-Za-z0-9_.-]+==[^\s;@]+( ; .*)? \\", line)
        assert pin or re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
        assert not pin or lines[number + 1].startswith("    --hash=sha256:"), line
    assert "--require-hashes" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
