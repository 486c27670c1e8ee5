"""Looks up known vulnerabilities of every locked package, and writes the bill of materials (CycloneDX JSON).

    python .ci/audit.py sbom.json

Ends with status 1 where a package is known to be vulnerable. Where no advisory database can be reached, it says that
nothing was looked up, rather than that nothing was found.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent


def audit() -> bool:
    """Whether no package of the lock is known to be vulnerable; pip-audit alone passes over what it cannot look up."""
    words = ["--requirement", HERE / "requirements.txt", "--disable-pip", "--require-hashes", "--timeout", "5"]
    command = [BIN / "pip-audit", *words, "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        print("nothing was looked up:", (done.stderr.strip().splitlines() or ["no answer"])[-1])
        return True
    known = [package for package in packages if "vulns" in package]
    found = [(package, problem) for package in known for problem in package["vulns"]]
    for package, problem in found:
        print(f"{package['name']} {package['version']}: {problem['id']}, mended in {problem['fix_versions']}")
    print(f"{len(known)} of {len(packages)} packages looked up, {len(found)} known vulnerabilities")
    if not known:
        print("no advisory database answers here, so nothing is known")
    return not found


def write_bill(out: Path) -> None:
    """What is installed in this environment, with licenses and what needs what."""
    words = ["environment", sys.executable, "--pyproject", HERE.parent / "pyproject.toml", "--of", "JSON"]
    subprocess.run([BIN / "cyclonedx-py", *words, "--output-file", out], check=True, capture_output=True)
    bill = json.loads(out.read_text(encoding="utf-8"))
    print(f"{out}: {len(bill['components'])} components, CycloneDX {bill['specVersion']}")


if __name__ == "__main__":
    write_bill(Path(sys.argv[1]))
    sys.exit(not audit())
