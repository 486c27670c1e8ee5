"""Grids, plans, the driver and its engines, and the tables of a whole ledger."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import pytest

from antibackdoor.attacks import ATTACKS
from antibackdoor.bench.cell import Cell, run_cell
from antibackdoor.bench.engines import Event, Here, Local, Task, make_engine, work
from antibackdoor.bench.grid import read_grid
from antibackdoor.bench.ledger import Ledger, Record, compact, digest, read_ledger
from antibackdoor.bench.plan import Estimates, duration, plan_text
from antibackdoor.bench.run import LOST, Watcher, run_cells
from antibackdoor.bench.tables import MAIN_TRAINING, detection_table, latex, markdown, render, table
from antibackdoor.data.arrays import write_npz
from antibackdoor.data.catalog import CATALOG
from antibackdoor.data.core import Splits
from antibackdoor.defenses import DEFENSES
from antibackdoor.errors import InputError
from antibackdoor.options import values
from toy import toy_images
from toy_files import write_images

GRID = """
[[cells]]
data = ["digits"]
train_size = 120
attacks = ["badnets"]
attack_options = { rate = 0.2 }
defenses = ["none", "e2abl"]
models = ["resnet18-w4"]
epochs = 1
seeds = [0]
[[cells]]
data = ["digits"]
train_size = 120
attacks = ["none"]
defenses = ["none"]
models = ["resnet18-w4"]
epochs = 1
seeds = [0, 0]
"""
FAST = {
    "e2abl": {"warm_up.epochs": 1, "warm_up.min_steps": 0, "main.min_steps": 0},
    "none": {"recipe.min_steps": 0},
}
LONG = """
[[cells]]
data = ["digits"]
train_size = 60
attacks = ["badnets"]
models = ["resnet18-w4"]
epochs = 400
defense_options = { "recipe.min_steps" = 0 }
"""
TINY = Cell(data="digits", train_size=60, model="resnet18-w4", epochs=1, defense_options=FAST["none"])
PROFILES = """
[profile.cpu]
models = ["resnet18-w16"]
seeds = [0]
epochs = 2
[profile.paper]
models = ["resnet34"]
seeds = [0, 1, 2]
needs_gpu = true

[[cells]]
data = ["digits", "japanese_vowels"]
attacks = ["badnets", { name = "blend", label = "faint", options = { alpha = 0.1 }, published = "strength=10%" }]
rates = [0.05, 0.1]
defenses = ["none", { name = "e2abl", label = "trap only", options = { control = "nothing" }, x = 3 }]
[cells.cpu]
train_size = 500

[[override]]
where = { data = "japanese_vowels", attack = "blend" }
set = { epochs = 9, attack_options = { share = 0.2 } }
[[override]]
profile = "paper"
where = { defense = "trap only" }
set = { model = "resnet50" }
[[exclude]]
where = { data = "digits", attack = "faint", rate = [0.05] }
reason = "too faint"
[[exclude]]
profile = "cpu"
where = { data = "japanese_vowels", attack = "badnets" }
needs_gpu = true
"""


def grid(folder: Path, text: str) -> Path:
    path = folder / "grid.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_grid_is_the_product_of_its_lists_without_doubles(tmp_path: Path) -> None:
    cells = read_grid(grid(tmp_path, GRID)).cells()
    assert [(c.attack, c.defense, c.seed) for c in cells] == [
        ("badnets", "none", 0),
        ("badnets", "e2abl", 0),
        ("none", "none", 0),
    ]
    assert cells[0].attack_options == {"rate": 0.2} and cells[0].train_size == 120


def test_a_part_of_a_grid(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        '[[cells]]\ndata = ["digits"]\nattacks = ["badnets", "blend"]\ndefenses = ["none"]\nseeds = [0, 1]\n'
    )
    assert [(cell.attack, cell.seed) for cell in read_grid(path).cells("blend.*s1")] == [("blend", 1)]
    with pytest.raises(InputError, match=r"no cell of .* has 'wanet' in its name"):
        read_grid(path).cells("wanet")
    with pytest.raises(InputError, match="regular expression"):
        read_grid(path).cells("(")


def test_profiles_overrides_and_exclusions(tmp_path: Path) -> None:
    path = grid(tmp_path, PROFILES.replace("share = 0.2", "target = 1"))
    cpu, paper = read_grid(path), read_grid(path, "paper")
    assert (cpu.profile, cpu.needs_gpu, paper.needs_gpu) == ("cpu", False, True)
    assert len(cpu.places) == 2 * 2 * 2 * 2 and len(paper.places) == 3 * len(cpu.places)
    faint = [p for p in cpu.places if p.axes["attack"] == "faint" and p.axes["data"] == "digits"]
    assert [p.excluded for p in faint] == ["excluded: too faint"] * 2 + [""] * 2
    assert faint[2].cell.attack_options == {"alpha": 0.1, "rate": 0.1} and faint[2].published == {"strength=10%"}
    assert [p.x for p in faint] == [None, 3, None, 3] and faint[3].cell.defense_options == {"control": "nothing"}
    assert {p.cell.train_size for p in cpu.places} == {500} and {p.cell.train_size for p in paper.places} == {None}
    vowels = [p for p in cpu.places if p.axes["data"] == "japanese_vowels"]
    assert {(p.axes["attack"], p.cell.epochs, p.cell.attack_options.get("target")) for p in vowels} == {
        ("badnets", 2, None),
        ("faint", 9, 1),
    }
    assert {p.excluded for p in vowels if p.axes["attack"] == "badnets"} == {"needs a GPU"}
    assert {(p.axes["defense"], p.cell.model) for p in paper.places} == {
        ("none", "resnet34"),
        ("trap only", "resnet50"),
    }
    assert len(cpu.cells()) == 16 - 2 - 4 and len(cpu.excluded()) == 6
    assert len(paper.cells()) == 3 * 14


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "key of .*'x'"),
        ("[profile.cpu]", "must consist of"),
        ("[[cells]]\nattaks = ['badnets']", "did you mean 'attacks'"),
        ("[[cells]]\nseeds = []", "at least one"),
        ("[[cells", "not a grid"),
        ("[[cells]]\nepochs = 'many'", "epochs"),
        ("[[cells]]\nattacks = [{ nam = 'x' }]", "did you mean 'name'"),
        ("[[cells]]\nattacks = [{ label = 'x' }]", "needs a `name`"),
        ("[[cells]]\n[[exclude]]\nwhere = { attack = 'x' }", "`reason`"),
        ("[[cells]]\n[[exclude]]\nwhere = { atack = 'x' }\nreason = 'r'", "did you mean 'attack'"),
        ("[[cells]]\n[[override]]\nwhere = { seed = 1 }\nset = { sed = 1 }", "key of .*'sed'"),
        ("[profile.cpu]\n[[cells]]\n[[override]]\nprofile = 'cup'\nwhere = {}\nset = {}", "did you mean 'cpu'"),
    ],
)
def test_a_bad_grid_is_told_in_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_grid(grid(tmp_path, text))


def test_an_unknown_profile_or_method_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'paper'"):
        read_grid(grid(tmp_path, PROFILES), "papr")
    with pytest.raises(InputError, match="did you mean 'badnets'"):
        read_grid(grid(tmp_path, "[[cells]]\nattacks = ['badnet']")).cells()


def test_the_name_of_a_cell_follows_its_settings() -> None:
    one, same, other = Cell(defense="e2abl"), Cell(defense="e2abl", seed=0), Cell(defense="e2abl", seed=1)
    explicit = Cell(defense="e2abl", defense_options={"recovery_rate": 0.01})
    assert one.name() == same.name() == explicit.name() != other.name()


def test_a_new_version_of_a_defense_renames_its_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, other = Cell(defense="nad"), Cell(defense="none")
    before = cell.name(), other.name()
    monkeypatch.setattr(DEFENSES["nad"].make, "version", 1000)
    assert cell.name() != before[0] and other.name() == before[1]


def test_an_option_younger_than_results_renames_cells_only_where_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, same = Cell(defense="jury"), Cell(defense="jury", defense_options={"disarmed": 0.5})
    other = Cell(defense="jury", defense_options={"disarmed": 0})
    assert cell.resolved()["defense_options"]["disarmed"] == 0.5, "a record tells it anyway"
    assert cell.name() == same.name() != other.name()
    before = cell.name(), other.name()
    monkeypatch.setattr(DEFENSES["jury"].make, "later", frozenset())
    assert cell.name() == same.name() != before[0] and other.name() == before[1]


def test_names_of_results_stand() -> None:
    ledger = Path(__file__).resolve().parents[2] / "results" / "first-results-series"
    name, record = next(iter(read_ledger(ledger).items()))
    cell = {key: value for key, value in record["cell"].items() if key != "defense_changes"}
    assert Cell(**{**cell, "defense_options": record["cell"]["defense_changes"]}).name() == name
    names = {entry.name: Cell(data=entry.name).name() for entry in CATALOG.values()}
    assert all(name.startswith(f"{data}-none-none-auto-s0-") for data, name in names.items())


def own_data(path: Path, seed: int = 0) -> str:
    path.parent.mkdir(exist_ok=True)
    write_npz(path, Splits(toy_images(20, seed=seed), toy_images(8, seed=seed + 1)))
    return str(path)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_benchmark_of_a_file_leaves_everything_in_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absolute: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    data, ledger = own_data((tmp_path if absolute else Path()) / "dd" / "x.npz"), tmp_path / "ledger"
    block = GRID[GRID.rindex("[[cells]]") :].replace("digits", data).replace("[0, 0]", "[0, 1]")
    path = grid(tmp_path, block + 'defense_options = { "recipe.min_steps" = 0 }')

    def run() -> set[str]:
        assert run_cells(read_grid(path).cells(), Ledger(ledger), Here(), stages=ledger / ".stages", device="cpu") == []
        return {file.stem for file in ledger.glob("*.json")}

    first = run()
    assert len(first) == 2 and all("dd_x_npz-none-none-resnet18-w4-s" in name for name in first)
    assert run() == first == set(read_ledger(ledger))
    assert {file.name for file in tmp_path.iterdir()} == {"dd", "grid.toml", "ledger"}
    assert [file.name for file in (tmp_path / "dd").iterdir()] == ["x.npz"]
    own_data(Path(data), seed=2)
    second = run()
    assert first < second and len(second) == 4, "what was made of other data does not stand for these"
    own_data(Path(data))
    assert run() == second, "what counts is the content, not when it was written"


def test_a_cell_counts_what_a_path_holds_and_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, alike = (Cell(data=own_data(Path(path))) for path in ("a_x.npz", "a/x.npz"))
    catalog = Cell(data="digits")
    assert one.resolved()["content"] == alike.resolved()["content"] and "content" not in catalog.resolved()
    assert one.name() != alike.name() and one.name()[:-8] == alike.name()[:-8]
    train = one.resolved()["content"][0]
    write_npz(tmp_path / "a_x.npz", Splits(toy_images(20), toy_images(8, seed=5)))
    assert one.resolved()["content"][0] == train and one.resolved()["content"] != alike.resolved()["content"]
    before = catalog.name()
    write_images(tmp_path / "digits", count=2)  # a path goes before a name
    assert catalog.name() != before
    assert len(Cell(data="x" * 200).name()) < 100, "data that are not there are told when they are needed"


def test_data_that_change_under_a_benchmark_are_told(tmp_path: Path) -> None:
    cell = replace(TINY, data=own_data(tmp_path / "x.npz"))
    task = Task(cell.name(), cell, tmp_path / "s", "cpu")
    own_data(tmp_path / "x.npz", seed=2)
    event = work(task, lambda told: None)
    assert event.kind == "broken" and "holds something else than when the benchmark began" in event.content["error"]


def test_cells_run_once_and_a_broken_one_does_not_stop_the_rest(tmp_path: Path) -> None:
    cells = [replace(c, defense_options=FAST[c.defense]) for c in read_grid(grid(tmp_path, GRID)).cells()]
    cells.insert(1, Cell(data="digits", attack="badnets", attack_options={"target": 99}))
    ledger, stages = tmp_path / "ledger", tmp_path / "stages"

    def run() -> list[str]:
        return run_cells(cells, Ledger(ledger), Here(), stages=stages, device="cpu")

    assert run() == [cells[1].name()]
    error = json.loads((ledger / f"{cells[1].name()}.error.json").read_text())
    assert "99" in error["error"] and "Traceback" in error["traceback"]
    before = {path.name: path.read_bytes() for path in ledger.glob("*.json") if "error" not in path.name}
    assert set(before) == {f"{cell.name()}.json" for cell in cells if cell.attack_options.get("target") != 99}
    assert [path.name for path in stages.iterdir()] == [cells[1].name()]  # what is done leaves no checkpoints behind
    assert run() == [cells[1].name()]  # only the broken one is tried again
    assert before == {name: (ledger / name).read_bytes() for name in before}

    records = list(read_ledger(ledger).values())
    assert all(r["history_digest"] == digest(r["history"]) and r["scale"]["train"] == 120 for r in records)
    rows = table(records)
    assert rows[["attack", "n"]].to_numpy().tolist() == [["badnets", 1], ["badnets", 1], ["none", 1]]
    assert rows["gate"].tolist()[2] == "" and set(rows["gate"].tolist()[:2]) <= {"takes", "attack did not take"}
    found = detection_table(records)
    assert len(found) == 1 and found["recall isolated set"].tolist()[0]
    assert markdown(rows).count("\n") == 2 + len(rows)


def test_a_traced_cell_is_trained_like_one_that_is_not() -> None:
    cell = replace(TINY, attack="badnets", defense="e2abl", defense_options=FAST["e2abl"])
    plain, traced = (run_cell(c, device="cpu") for c in (cell, replace(cell, trace=True)))
    assert plain["measures"] == traced["measures"] and plain["cell"] != traced["cell"]
    last = traced["history"][-1]
    assert last["main_clean_accuracy"] == traced["measures"]["clean_accuracy"]["value"]
    assert last["main_attack_success_rate"] == traced["measures"]["attack_success_rate"]["value"]
    names = {f"{head}_train_accuracy_{part}" for head in ("main", "second") for part in ("clean", "poisoned")}
    assert names <= set(last) and not names & set(plain["history"][-1])


Outcome = Literal["done", "lost", "epoch"]


class Scripted:
    """An engine that does what it is told instead of training: these outcomes, in turn for each call, then "done"."""

    parallel = True

    def __init__(self, outcomes: dict[str, list[Outcome]], slots: int = 2, seconds: float = 0.0):
        self.outcomes, self.slots, self.seconds = outcomes, slots, seconds
        self.submitted: list[str] = []
        self.running: list[Task] = []

    def ready(self, task: Task) -> bool:
        return len(self.running) < self.slots

    def submit(self, task: Task) -> None:
        self.submitted.append(task.name)
        self.running.append(task)

    def poll(self, timeout: float) -> list[Event]:
        time.sleep(self.seconds)
        task = self.running.pop(0)
        outcomes = self.outcomes.get(task.name)
        outcome = outcomes.pop(0) if outcomes else "done"
        if outcome == "epoch":
            self.running.append(task)
        return [Event(task.name, outcome, {**past(task.cell, 1.0), "error": "x", "epoch": 1})]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.running.clear()


def seeds(count: int) -> list[Cell]:
    return [replace(TINY, seed=seed) for seed in range(count)]


def test_what_is_lost_is_given_out_again_but_not_for_ever(tmp_path: Path) -> None:
    cells = seeds(3)
    names = [cell.name() for cell in cells]
    engine = Scripted({names[0]: ["lost", "done"], names[1]: ["lost"] * LOST})
    assert run_cells(cells, Ledger(tmp_path), engine, stages=tmp_path / ".stages") == [names[1]]
    assert sorted(engine.submitted) == sorted([names[0]] * 2 + [names[1]] * LOST + [names[2]])
    assert set(read_ledger(tmp_path)) == {names[0], names[2]}
    assert Ledger(tmp_path).error(names[1]) == "x" and Ledger(tmp_path).error(names[0]) is None


def test_what_is_lost_goes_on_before_others_begin(tmp_path: Path) -> None:
    cells = seeds(3)
    first = cells[0].name()
    engine = Scripted({first: ["lost", "done"]}, slots=1)
    run_cells(cells, Ledger(tmp_path), engine, stages=tmp_path / ".stages")
    assert engine.submitted[:2] == [first, first]


def test_a_cell_that_gets_on_may_be_lost_often(tmp_path: Path) -> None:
    (cell,) = seeds(1)
    engine = Scripted({cell.name(): ["lost", "lost", "epoch", "lost", "lost", "epoch", "lost"]})
    assert run_cells([cell], Ledger(tmp_path), engine, stages=tmp_path / ".stages") == []
    assert set(read_ledger(tmp_path)) == {cell.name()}


def test_a_record_is_never_written_over(tmp_path: Path) -> None:
    Ledger(tmp_path).write("a", {"measures": 1})
    with pytest.raises(FileExistsError, match="already"):
        Ledger(tmp_path).write("a", {"measures": 2})
    assert read_ledger(tmp_path) == {"a": {"measures": 1}}


def test_two_drivers_share_a_ledger_without_doubles(tmp_path: Path) -> None:
    cells, engines = seeds(9), [Scripted({}, seconds=0.02) for _ in range(2)]
    drivers = [
        threading.Thread(target=run_cells, args=(cells, Ledger(tmp_path), engine), kwargs={"stages": tmp_path / ".s"})
        for engine in engines
    ]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert sorted(engines[0].submitted + engines[1].submitted) == sorted(cell.name() for cell in cells)
    assert all(engine.submitted for engine in engines) and len(read_ledger(tmp_path)) == 9


def test_a_claim_ends_with_its_holder(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with ledger.claim("a") as first, ledger.claim("a") as second, ledger.claim("b") as other:
        assert (first, second, other) == (True, False, True)
    with ledger.claim("a") as again:
        assert again


@pytest.mark.long
def test_a_worker_ends_with_its_driver(tmp_path: Path) -> None:
    """The input of a worker ends when its driver is killed, in whatever way."""
    (cell,) = read_grid(grid(tmp_path, LONG)).cells()
    worker = subprocess.Popen([sys.executable, "-m", "antibackdoor.bench.worker"], stdin=-1, stdout=-1, text=True)
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(Task(cell.name(), cell, tmp_path, "cpu").text() + "\n")
    worker.stdin.flush()
    assert Event(**json.loads(worker.stdout.readline())).content["epochs"] == 400
    worker.stdin.close()
    assert worker.wait(timeout=60) == 0
    assert all(Event(**json.loads(line)).kind == "epoch" for line in worker.stdout)  # it did not finish


def test_a_cell_that_was_cut_goes_on_to_the_same_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("antibackdoor.bench.cell.CHECKPOINT_SECONDS", -1.0)
    cell, ran = replace(TINY, attack="badnets", epochs=5), list[int]()

    class Cut(Watcher):
        def epoch(self, name: str, content: dict[str, Any]) -> None:
            ran.append(content["epoch"])

    def die(told: Event) -> None:
        if told.content["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(Task(cell.name(), cell, tmp_path / "ledger" / ".stages" / cell.name(), "cpu"), die)
    ledger, stages = Ledger(tmp_path / "ledger"), tmp_path / "ledger" / ".stages"
    assert run_cells([cell], ledger, Here(), stages=stages, device="cpu", watcher=Cut()) == []
    assert ran == [0, 3, 4, 5]  # the epoch after which it was cut was not yet kept
    same_as_undisturbed([cell], tmp_path)


def same_as_undisturbed(cells: list[Cell], folder: Path) -> None:
    """Finish the ledger that was cut, and make another at one go."""
    ledgers = {"ledger": folder / "ledger" / ".stages", "whole": folder / "other"}
    for name, stages in ledgers.items():
        assert run_cells(cells, Ledger(folder / name), Here(), stages=stages, device="cpu") == []
    cut, whole = (read_ledger(folder / name) for name in ledgers)
    assert set(cut) == set(whole) == {cell.name() for cell in cells}
    for name in cut:
        for key in ("cell", "scale", "measures", "history_digest"):
            assert cut[name][key] == whole[name][key]


def test_local_workers_mind_cores_and_memory() -> None:
    engine = Local(3)
    engine.memory = 1000
    worker = type("W", (), {"task": Task("a", TINY, Path(), memory=700)})
    assert engine.ready(Task("b", TINY, Path(), memory=5000))  # alone, whatever it takes
    engine.workers = [worker]  # type: ignore[list-item]
    assert engine.ready(Task("b", TINY, Path(), memory=200)) and not engine.ready(Task("b", TINY, Path(), memory=201))
    engine.workers = [worker] * 3  # type: ignore[list-item]
    engine.memory = None
    assert not engine.ready(Task("b", TINY, Path(), memory=1))
    assert isinstance(make_engine("local", workers=0), Here)


def test_a_task_travels_as_text(tmp_path: Path) -> None:
    cell = replace(TINY, attack="badnets", attack_options={"rate": 0.2})
    task = Task(cell.name(), cell, tmp_path, "cpu")
    assert Task.read(task.text()) == task
    told: list[Event] = []
    event = work(replace(task, stages=tmp_path / "s"), told.append)
    assert event.kind == "done" and [e.content["epoch"] for e in told] == [0, 1]


def past(
    cell: Cell, seconds: float, device: str = "cpu (x86_64, AVX2)", n: int = 60, memory: int = 100
) -> dict[str, Any]:
    measures = {"poisoned_samples": {"count": 0, "n": n}}
    cost = {"seconds": seconds, "peak_memory_mib": memory}
    return {"cell": cell.resolved(), "environment": {"device": device}, "measures": measures, "cost": cost,
            "scale": {"train": n, "train_full": 1000}}  # fmt: skip


def test_a_plan_scales_what_was_measured(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for seed, seconds in enumerate([10.0, 30.0, 14.0]):
        cell = replace(TINY, seed=seed)
        ledger.write(cell.name(), past(cell, seconds, memory=100 + seed))
    fast = replace(TINY, seed=9)
    ledger.write(fast.name(), past(fast, 1.0, "cuda (NVIDIA H200, AVX512)"))
    estimates = Estimates(tmp_path, "cpu")
    assert estimates.seconds(replace(TINY, seed=5)) == 14.0
    assert estimates.seconds(replace(TINY, train_size=120)) == 28.0
    assert estimates.seconds(replace(TINY, train_size=None, epochs=3)) == pytest.approx(14.0 * 3 * 1000 / 60)
    assert estimates.seconds(replace(TINY, train_size=99999)) == pytest.approx(14.0 * 1000 / 60)
    assert estimates.seconds(replace(TINY, epochs=None)) is None  # a default that may mean any number of epochs
    assert estimates.seconds(replace(TINY, model="resnet34")) is None
    assert Estimates(tmp_path, "cuda").seconds(TINY) == 1.0
    assert estimates.memory(TINY) == 102 and estimates.memory(replace(TINY, defense="e2abl")) == 1536
    cells = [*seeds(3), replace(TINY, seed=5), replace(TINY, seed=6, train_size=120), replace(TINY, model="resnet34")]
    names = {cell.name(): cell for cell in cells}
    order = estimates.longest_first(list(names)[3:], names)
    assert [names[name].model == "resnet34" or names[name].seed for name in order] == [True, 6, 5]
    done = [name for name in names if name in ledger]
    text = plan_text(cells, {"x": "excluded: no"}, done, estimates, 2)
    assert text.count("done  ") == 3 and "(14 s)" in text and "(28 s)" in text and "(unknown)" in text
    assert text.splitlines()[-1] == (
        "6 cells: 3 done, 3 missing, 1 left out; estimated time with 2 workers: 28 s and 1 of unknown time"
    )
    assert plan_text(cells[:3], {}, done, estimates, 1).endswith("3 cells: 3 done, 0 missing, 0 left out")
    assert [duration(s) for s in (40, 720, 12600)] == ["40 s", "12 min", "3.5 h"]


def test_a_plan_counts_the_fitting_of_an_attack(tmp_path: Path) -> None:
    ledger, fitted = Ledger(tmp_path), replace(TINY, attack="latent")
    ledger.write(TINY.name(), past(TINY, 10.0))
    assert Estimates(tmp_path).seconds(fitted) == 10.0, "nothing better is known"
    record = past(fitted, 10.0)
    record["cost"]["wall_seconds"] = 25.0
    ledger.write(fitted.name(), record)
    estimates = Estimates(tmp_path)
    assert estimates.seconds(replace(fitted, seed=1)) == 25.0 and estimates.seconds(TINY) == 10.0
    assert estimates.seconds(replace(TINY, attack="blend")) == 17.5
    resumed = past(TINY, 10.0)
    resumed["cost"]["wall_seconds"] = 1.0
    Ledger(tmp_path / "resumed").write(TINY.name(), resumed)
    assert Estimates(tmp_path / "resumed").seconds(replace(TINY, seed=1)) == 10.0, "1 second was its last part"


def test_a_plan_goes_by_the_cells_with_the_most_options_as_here(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    long = replace(TINY, defense_options={"recipe": {"min_steps": 900}})
    for cell, seconds in ((TINY, 1.0), (replace(long, attack="blend"), 50.0)):
        ledger.write(cell.name(), past(cell, seconds))
    estimates = Estimates(tmp_path)
    assert estimates.seconds(long) == 50.0, "though its attack is another one"
    assert estimates.seconds(replace(TINY, defense_options={"recipe.min_steps": 900})) == 50.0, "the same, written flat"
    assert estimates.seconds(replace(TINY, attack="blend")) == 1.0


def test_a_record_is_small_and_plain(tmp_path: Path) -> None:
    record = {"cell": {"a": 1}, "history": [{"epoch": 1}, {"epoch": 2}], "none": []}
    text = compact(record)
    assert json.loads(text) == record and text.count("\n") == 8
    (tmp_path / ".stages").mkdir()
    (tmp_path / ".stages" / "x.json").write_text('{"measures": 1}')
    (tmp_path / "cost.json").write_text("{}")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.json").write_text('{"measures": {}}')
    assert set(read_ledger(tmp_path)) == {"a"} and "a" in Ledger(tmp_path)


def test_a_cell_may_judge_detectors_too(tmp_path: Path) -> None:
    block = GRID[: GRID.index("[[cells]]", 5)].replace('"none", "e2abl"', '"none"')
    plain = read_grid(grid(tmp_path, block)).cells()[0]
    detecting = read_grid(grid(tmp_path, block + 'detectors = ["loss", "loss_drop"]')).cells()[0]
    assert plain.name() != detecting.name() and "detectors" not in plain.resolved()
    assert set(detecting.resolved()["detectors"]) == {"loss", "loss_drop"}  # with their settings: part of the hash
    fast = Cell(**{**vars(detecting), "defense_options": FAST["none"]})
    found = run_cell(fast, folder=tmp_path, device="cpu")["measures"]["detectors"]
    assert found["loss"]["steps"] == 0 < found["loss_drop"]["steps"]
    assert found["loss"]["precision_at"]["0.1"]["n"] == 12 and 0 <= found["loss"]["auroc"]["value"] <= 1
    with pytest.raises(InputError, match="did you mean 'entropy'"):
        read_grid(grid(tmp_path, block + 'detectors = ["entropi"]')).cells()


def record(defense: str, seed: int, rate: float) -> Record:
    cell = {"data": "d", "train_size": None, "model": "m", "attack": "badnets", "attack_options": {}, "seed": seed}
    measures = {"clean_accuracy": {"value": 0.5 + seed / 10}, "attack_success_rate": {"value": rate}}
    options = {"recipe" if defense == "none" else "main": {"augment": "weak"}}
    cell |= {"defense": defense, "defense_options": options, "defense_changes": {}}
    return {"cell": cell, "measures": measures, "cost": {"seconds": 1.0}}


@pytest.mark.parametrize(("undefended", "gate"), [(0.96, "takes"), (0.94, "attack did not take")])
def test_a_row_is_worth_what_its_attack_does_without_a_defense(undefended: float, gate: str) -> None:
    rows = table([record("e2abl", 0, 0.1), record("e2abl", 1, 0.3), record("none", 0, undefended)])
    assert rows["gate"].tolist() == [gate, gate]
    assert rows["CA"].tolist() == ["55.0 ± 7.1", "50.0"] and rows["ASR"].tolist()[0] == "20.0 ± 14.1"
    assert table([record("e2abl", 0, 0.1)])["gate"].tolist() == ["no undefended cell"]
    otherwise = record("none", 1, 1 - undefended)
    otherwise["cell"] |= {
        "defense_changes": {"recipe.augment": "none"},
        "defense_options": {"recipe": {"augment": "none"}},
    }
    rows = table([record("e2abl", 0, 0.1), record("none", 0, undefended), otherwise])
    assert rows["gate"].tolist() == [gate, gate, "attack did not take"], "another recipe is another question"
    plain = record("e2abl", 0, 0.1)
    plain["cell"]["defense_options"] = otherwise["cell"]["defense_options"]
    rows = table([plain, record("none", 0, undefended), otherwise])
    assert rows["gate"].tolist() == ["attack did not take", gate, "attack did not take"], "trained as it was"
    control = record("none", 0, undefended)
    control["cell"]["attack_options"] = {"rate": 0.0}
    assert table([control])["gate"].tolist() == ["nothing poisoned"]


@pytest.mark.parametrize("entry", list(DEFENSES), ids=lambda entry: entry.name)
def test_the_main_training_of_every_defense_is_known_by_its_name(entry: Any) -> None:
    assert len(set(MAIN_TRAINING) & set(values(entry.make()))) == 1


def test_a_row_names_what_was_changed_of_its_attack() -> None:
    changed, usual = record("none", 0, 1.0), record("none", 0, 1.0)
    changed["cell"] |= {"attack": "latent", "attack_options": {"rate": 0.05, "share": 0.25, "recipe": {"epochs": 3}}}
    usual["cell"] |= {"attack": "latent", "attack_options": values(ATTACKS["latent"].make())}
    rows = table([changed, usual])
    assert sorted(rows["attack"]) == ["latent", "latent recipe.epochs=3 share=0.25"]
    assert sorted(rows["rate"]) == ["0.05", "0.1"]


def test_a_table_as_latex_and_csv() -> None:
    frame = table([record("e2abl", 0, 0.1), record("e2abl", 1, 0.3)])[["attack", "ASR"]]
    assert latex(frame) == (
        "\\begin{tabular}{ll}\n\\hline\nattack & ASR \\\\\n\\hline\n"
        "badnets & 20.0 $\\pm$ 14.1 \\\\\n\\hline\n\\end{tabular}\n"
    )
    assert render(frame, "csv") == "attack,ASR\nbadnets,20.0 ± 14.1\n"
    assert render(frame, "markdown") == "| attack | ASR |\n| --- | --- |\n| badnets | 20.0 ± 14.1 |\n"
