"""What the docs say of results is what the ledger says."""

import json
import re
import runpy
import shlex
from pathlib import Path

import yaml
from PIL import Image
from typer.main import get_command

import antibackdoor
from antibackdoor.attacks import ATTACKS
from antibackdoor.cli import app
from antibackdoor.threats import references

ROOT = Path(__file__).resolve().parents[2]


def test_pages_and_figures_are_made_from_the_ledger() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "build_results.py"))["pages"]()
    for name, text in pages.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"run docs/build_results.py: {name} is old"
    assert pages["results.md"].count("| e2abl |") >= 1
    assert sum(text.count("\n## ") for name, text in pages.items() if name.startswith("reproduction/")) >= 16
    figures = {f"figures/{path.name}" for path in (ROOT / "docs" / "figures").glob("*.svg")}
    assert figures == {name for name in pages if name.endswith(".svg")}


def test_the_readme_counts_what_the_default_stops() -> None:
    """Rows of the jury on three sets of series whose attack takes undefended, and those of excess ASR up to 5 %."""
    lines = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.count("|") == 14]
    sets = {"ecg5000", "uwave_extended", "arabic_digits"}
    rows = [row for row in rows if row[0] in sets and row[6] == "jury" and row[4] != "none"]
    excess = [float(row[9].split()[0]) for row in rows if row[12] == "takes"]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"under {len(rows)} attacks" in text and f"of which {len(excess)} take without a defense" in text
    assert f"It stopped {sum(value <= 5 for value in excess)} of these" in text


def test_the_readme_sets_the_default_beside_its_rivals() -> None:
    """Mean attack success rates on ECG5000 of E2ABL's Table I, in the order that the sentence has them."""
    lines = (ROOT / "docs" / "reproduction" / "e2abl.md").read_text(encoding="utf-8").splitlines()
    columns = ["none", "fine_pruning", "nad", "abl", "e2abl", "e2abl:paper", "jury"]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for attack, sentence in (
        ("timetrojan_de", "{jury} % with the default, {nad} % with NAD, {e2abl} % with E2ABL, {abl} % with ABL and"),
        ("tsba", "under TSBA it is {jury} %, {nad} %, {e2abl} %, {abl} % and {fine_pruning} %"),
    ):
        row = next(line for line in lines if line.startswith(f"| ecg5000 | {attack} |") and "×" in line)
        cells = [cell.strip() for cell in row.split("|")[3:-1]]
        rates = dict(zip(columns, cells[0::2], strict=False))
        assert all("×3" in rates[name] for name in columns)
        means = {name.partition(":")[0]: rate.split()[0] for name, rate in rates.items() if name != "e2abl:paper"}
        assert sentence.format(**means) in text


def test_the_readme_has_the_means_of_the_ledger() -> None:
    """Its table of CIFAR-10: clean accuracy, attack success rate, recovery accuracy, how many seeds if not one."""
    lines = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.count("|") == 14]
    told = {}
    for data, size, budget, _, attack, _, defense, *rates, n, _ in rows:
        if (data, size, budget) == ("cifar10", "20000", "epochs 20, batch 64"):
            means = [rate.split()[0] for rate in (rates[0], rates[1], rates[3]) if rate]
            told[attack, defense] = " / ".join(means) + (f" ({n} seeds)" if n != "1" else "")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for words, attack in {"none": "none", "BadNets": "badnets", "Blend": "blend", "SIG": "sig delta=40"}.items():
        cells = (told.get((attack, defense), "not run") for defense in ("none", "e2abl", "jury"))
        assert f"| {' | '.join([words, *cells])} |" in text


def test_the_readme_counts_the_verdicts_of_the_default() -> None:
    page = (ROOT / "docs" / "verdict.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| all |"))  # the default's table is the first
    _, alarms, found, *_ = (cell.strip() for cell in row.split("|")[1:-1])
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"false alarms in {alarms} runs on clean data, and {found} attacks found" in text


def test_every_attack_is_in_the_gallery() -> None:
    gallery = runpy.run_path(str(ROOT / "docs" / "build_gallery.py"))
    assert (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8") == gallery["page"]({}), "docs/build_gallery.py"
    for name in gallery["SERIES"]:
        drawn = (ROOT / "docs" / "gallery" / f"{name}.svg").read_text(encoding="utf-8")
        assert all(f">{entry.name}<" in drawn for entry in ATTACKS if "series" in entry.kinds)
    columns = sum("image" in entry.kinds for entry in ATTACKS)
    for name in gallery["IMAGES"]:
        with Image.open(ROOT / "docs" / "gallery" / f"{name}.webp") as sheet:
            assert sheet.width == gallery["GAP"] + columns * (gallery["SIDE"] + gallery["GAP"])


def test_the_page_of_costs_is_made_from_what_was_measured() -> None:
    text = runpy.run_path(str(ROOT / "docs" / "build_scale.py"))["page"]()
    assert (ROOT / "docs" / "scale.md").read_text(encoding="utf-8") == text, "run docs/build_scale.py: scale.md is old"


def test_the_page_of_trust_says_what_was_measured() -> None:
    text = " ".join((ROOT / "docs" / "trust.md").read_text(encoding="utf-8").split())
    kills, mutants, coverage, soak = (
        json.loads((ROOT / "results" / "trust" / f"{name}.json").read_text("utf-8"))
        for name in ("kills", "mutants", "coverage", "soak")
    )
    there = sum(row["mutants"] for row in mutants.values() if isinstance(row, dict))
    share = 100 * mutants["killed"] / mutants["run"]
    assert f"tried {mutants['run']} of {there}, at random: {mutants['killed']} were noticed, {share:.0f} %" in text
    assert f"{coverage['percent_of_lines']} %" in text
    assert f"{kills['kills']} kills over all {len(kills['kills_by_case'])} cases, none lost, none different" in text
    assert f"{soak['cells'] - soak['done_before']} cells in {soak['minutes']:.0f} minutes" in text
    assert f"{soak['kills']['worker']} workers and {soak['kills']['bench']} bench killed" in text
    assert kills["problems"] == [] and soak["problems"] == []


def test_the_page_of_hostile_data_says_how_much_was_fuzzed() -> None:
    text = " ".join((ROOT / "docs" / "guides" / "hostile-data.md").read_text(encoding="utf-8").split())
    fuzz = json.loads((ROOT / "results" / "trust" / "fuzz.json").read_text("utf-8"))
    amount = (
        f"{fuzz['executions'] / 1e6:.1f} million executions in {fuzz['cpu_seconds'] / 3600:.1f} hours of processor time"
    )
    assert f"{amount} on {len(fuzz['targets'])} targets, and nothing broke" in text and fuzz["broken"] == 0
    assert {row["target"] for row in fuzz["targets"]} == {path.name for path in (ROOT / "fuzz" / "corpus").iterdir()}


def test_every_command_that_a_page_names_exists() -> None:
    """What stands in a line of text or a table is not run, unlike blocks; so its words are looked up."""
    commands = {command.name or "": command for command in get_command(app).commands.values()}  # type: ignore[attr-defined]
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = [words for page in pages for words in re.findall(r"`antibackdoor ([^`\n]+)`", page.read_text("utf-8"))]
    assert len(named) > 30
    for words in named:
        command, *rest = words.split()
        if command in commands:
            known = {name for option in commands[command].params for name in (*option.opts, *option.secondary_opts)}
            assert {word for word in rest if word.startswith("--")} <= known | {"--help"}, words
        else:
            assert command in {"COMMAND", "--help", "--version"}, words


NOT_RUN = {
    "console": "installs packages or serves a page: what a reader types, with its prompt",
    "yaml": "belongs to the machines of others; read by test_the_gates_for_other_machines",
}
"""Languages of blocks that the root's conftest.py does not run, and why."""
NOT_TYPED = {
    "python3 -m venv .venv && .venv/bin/pip install -q '.[review]' && .venv/bin/antibackdoor demo": "installs",
    "python3 -m venv .venv && .venv/bin/pip install -q -e '.[dev]' && .venv/bin/python -m pytest -n auto": "is CI",
    "source .venv/bin/activate": "is for the shell that it is typed into",
    "ANTIBACKDOOR_CACHE=/scratch antibackdoor scan photos --memory-map --out scan": "writes elsewhere",
}
"""Lines of bash blocks that are not run because they do not begin with `antibackdoor`, and why not."""


def test_no_block_of_the_docs_is_passed_over_in_silence() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    pattern = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    blocks = [found for page in pages for found in pattern.findall(page.read_text("utf-8"))]
    assert {language for language, _ in blocks} == {"python", "bash", "toml", *NOT_RUN}
    lines = [line.strip() for language, block in blocks if language == "bash" for line in block.splitlines()]
    assert {line for line in lines if line and not line.startswith(("antibackdoor ", "#"))} == set(NOT_TYPED)


def test_the_gates_for_other_machines() -> None:
    """The workflow and the pre-commit hook name commands, options and files that exist."""
    workflow = yaml.safe_load((ROOT / "docs" / "data-gate.yml").read_text("utf-8"))
    steps = workflow["jobs"]["scan"]["steps"]
    [gate] = [words for step in steps if (words := shlex.split(step.get("run", "")))[:2] == ["antibackdoor", "scan"]]
    known = {name for option in get_command(app).commands["scan"].params for name in option.opts}  # type: ignore[attr-defined]
    assert "--fail-on-poison" in gate and {word for word in gate if word.startswith("--")} <= known
    assert steps[-1]["if"] == "always()", "the report is wanted most where the gate stops"
    out = gate[gate.index("--out") + 1]
    assert steps[-1]["with"]["path"].split() == [
        f"{out}/{name}" for name in ("report.html", "suspects.csv", "verdict.json")
    ]
    [hook] = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text("utf-8"))
    assert set(re.findall(r"--[a-z-]+", hook["entry"])) <= known
    guide = (ROOT / "docs" / "guides" / "gate-your-ci.md").read_text("utf-8")
    [example] = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    assert [named["id"] for named in yaml.safe_load(example)["repos"][0]["hooks"]] == [hook["id"]]


def test_every_entry_of_atlas_and_nist_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "limits.md").read_text("utf-8")
    assert all(f"[{entry['id']}]({entry['url']}) | {entry['name']} |" in text for entry in references(True))


def test_everything_that_can_be_imported_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "index.md").read_text("utf-8")
    rooms = antibackdoor._ROOMS
    assert set(rooms) == set(antibackdoor.__all__)
    assert [name for name, room in rooms.items() if f"::: antibackdoor.{room}.{name}\n" not in page] == []


def test_every_page_is_in_the_navigation() -> None:
    listed = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f": {page}\n" not in listed and f"- {page}\n" not in listed] == []
