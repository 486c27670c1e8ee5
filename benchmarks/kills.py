"""Kills commands at random moments, goes on with them, and compares what they leave with an undisturbed run's.

    python benchmarks/kills.py --kills 200 --out results/trust/kills.json

Every trial takes a command with a method on toy data, kills it up to three times (each time in another moment of its
life), lets it end, and compares weights, scores, tables and poisoned sets with the reference, byte by byte; only times
and memory are left out of JSON files. After every kill, whatever looks finished must be the reference's already.
Checkpoints are written after every epoch in most trials, and there no more than the epoch that a kill struck may be
computed again. The review page is killed while decisions and exports are sent to it, and must know every decision that
it had acknowledged when it is started again. Workers of a grid are killed under their driver, which must end well.
A kill is SIGKILL at a random time, or just before a random one of the process's changes to its files (where half-made
things would be seen: time alone hits those windows seldom); or SIGTERM or SIGINT, which must end with one sentence.
Every case is taken once before any is taken twice. The exit status is 1 where anything was wrong, a case was not
reached, or there were fewer kills than asked for.
Processes are forked from one that has everything imported, and are otherwise the command line's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch

from antibackdoor import cli
from antibackdoor.attacks import ATTACKS
from antibackdoor.bench import cell as bench_cell
from antibackdoor.bench.poisoned import poison
from antibackdoor.data.arrays import write_npz
from antibackdoor.data.core import Data, Splits
from antibackdoor.data.load import load
from antibackdoor.defenses import DEFENSES, make_defense
from antibackdoor.detectors import DETECTORS, make_detector
from antibackdoor.environment import environment
from antibackdoor.files import write_json
from antibackdoor.review import server as _server  # noqa: F401 (imported before the fork, as all that follows)
from antibackdoor.scanning import scan as _scan  # noqa: F401
from antibackdoor.summary import print_summary as _summary  # noqa: F401
from antibackdoor.training.job import Job, make_fabric
from antibackdoor.training.loop import Fit, Recipe
from attack_settings import TINY
from toy import toy_images, toy_series

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
TIMES = {"seconds", "wall_seconds", "peak_memory_mib", "environment", "threads"}
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
ORDERLY = tuple(STATUS)
GRID = """
[[cells]]
data = ["digits"]
train_size = 60
attacks = ["none", "badnets"]
defenses = ["none"]
defense_options = { "recipe.min_steps" = 0 }
models = ["resnet18-w4"]
epochs = 2
seeds = [0]
[[cells]]
data = ["digits"]
train_size = 60
attacks = ["badnets"]
defenses = ["e2abl"]
defense_options = { "warm_up.epochs" = 2, "warm_up.min_steps" = 0, "main.min_steps" = 0 }
models = ["resnet18-w4"]
epochs = 2
seeds = [0]
"""


@dataclass(frozen=True)
class Case:
    """A command; {out} in its words is where it writes. resume: how it is called again.

    trial: how it is killed; begins: what lies at {out} before, None for nothing.
    """

    name: str
    words: list[str]
    resume: tuple[str, ...] = ()
    trial: Callable[[Case, Path, random.Random, Counter[str]], list[str]] | None = None
    begins: Path | None = None


def settings(method: Any) -> list[str]:
    """Words that give every stage of a method three epochs and no floor of steps."""
    stages = [f.name for f in dataclasses.fields(method) if isinstance(getattr(method, f.name), Recipe)]
    return [word for stage in stages for s in ("epochs=3", "min_steps=0") for word in ("--set", f"{stage}.{s}")]


def tiny_attack(name: str) -> list[str]:
    """The words for the settings under which the tests fit an attack in a moment."""
    words = []
    smooth = {"frequency": 5} if name == "sig" else {}  # its own frequency vanishes on so few pixels
    for key, value in {**TINY.get(name, {}), **smooth}.items():
        small = {"epochs": value.epochs, "min_steps": 0, "batch_size": 16} if isinstance(value, Recipe) else {"": value}
        words += [w for field, v in small.items() for w in ("--set", f"{key}.{field}={v}".replace(".=", "="))]
    return words


def in_range(data: Data) -> Data:
    """A toy set whose values are in one range with those of its like."""
    return data if data.spec.kind == "image" else replace(data, spec=replace(data.spec, low=-4.0, high=4.0))


def make_cases(root: Path) -> list[Case]:
    """Toy sets in `root`, and every defense, detector and attack, review's export and a grid, on them."""
    cases = []
    for kind, toy in (("image", toy_images), ("series", toy_series)):
        clean = Splits(*(in_range(toy(n, seed=seed)) for n, seed in ((64, 0), (16, 1))))
        write_npz(root / f"{kind}.npz", clean)
        write_npz(root / f"{kind}-bad.npz", poison(clean, "badnets", {"rate": 0.2}, fabric=make_fabric("cpu")).splits)
        write_npz(root / f"{kind}-few.npz", Splits(in_range(toy(20, seed=2))))
        common = [f"{root / kind}-bad.npz", "--out", "{out}", "--device", "cpu", "--quiet", "--model", "resnet18-w4"]
        for entry in DEFENSES:
            method = make_defense(entry.name)
            clean_set = ["--clean", f"{root / kind}-few.npz"] if "clean" in method.needs else []
            words = ["train", *common, "--defense", entry.name, *settings(method), *clean_set]
            cases.append(Case(f"train {entry.name} {kind}", words, ("--resume",)))
        for entry in DETECTORS:
            words = ["scan", *common, "--detector", entry.name, *settings(make_detector(entry.name))]
            cases.append(Case(f"scan {entry.name} {kind}", words, ("--resume",)))
        for number, attack in enumerate(entry for entry in ATTACKS if kind in entry.kinds):
            form = ["--format", ("npz", "folder")[number % 2]]
            words = ["poison", str(root / f"{kind}.npz"), "--attack", attack.name, "--out", "{out}", "--device", "cpu"]
            words += [*form, "--rate", "0.2", "--quiet", "--stages", "{out}-stages", *tiny_attack(attack.name)]
            cases.append(Case(f"poison {attack.name} {kind}", words))
    (root / "grid.toml").write_text(GRID)
    for workers in ("0", "1"):
        words = ["bench", str(root / "grid.toml"), "--out", "{out}", "--workers", workers, "--device", "cpu", "--quiet"]
        cases.append(Case(f"bench {workers} workers", words))
    cases.append(Case("bench, its worker killed", words, trial=worker_trial))
    run = root / "reviewed"
    status, _, told = Process(cases[0], run, 0).wait()
    assert status == 0, told
    words = ["review", str(run), "--quiet", "--export", "{out}", "--format"]
    cases += [Case(f"review {form}", [*words, form]) for form in ("npz", "csv")]
    return [*cases, Case("review page", ["review", "{out}", "--quiet", "--no-open"], trial=page_trial, begins=run)]


class Process:
    """A command in a process, and a session, of its own. at: before which change of its files it sends itself `sig`."""

    def __init__(self, case: Case, out: Path, checkpoint: float, *, resume: bool = False, at: int = -1, sig: int = 9):
        self.log, self.started = Path(f"{out}.log"), time.monotonic()
        words = [w.replace("{out}", str(out)) for w in (*case.words, *(case.resume if resume else ()))]
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._become(words, checkpoint, str(out), at, sig)
            finally:
                os._exit(99)

    def _become(self, words: list[str], checkpoint: float, out: str, at: int, sig: int) -> None:
        os.setsid()
        for number in (1, 2):
            os.dup2(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        for number in ORDERLY:  # before and after the command a signal meets this program, not the command's handling
            signal.signal(number, signal.SIG_IGN)
        Job.checkpoint_seconds = bench_cell.CHECKPOINT_SECONDS = checkpoint
        begun, run_epoch = Path(f"{out}.epochs"), Fit.run_epoch

        def counted(fit: Fit, *given: Any) -> dict[str, Any]:
            with begun.open("a") as file:
                file.write("x")
            return run_epoch(fit, *given)

        patch.object(Fit, "run_epoch", counted).start()
        seen = 0

        def hook(event: str, given: tuple[Any, ...]) -> None:
            nonlocal seen
            writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
            if (event in CHANGES or writes) and str(given[0]).startswith((out, str(Path(out).parent / "."))):
                seen += 1
                if seen - 1 == at:
                    os.kill(os.getpid(), sig)

        sys.addaudithook(hook)
        sys.argv = ["antibackdoor", *words]
        status = 0
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without
            try:
                cli.main()
            except SystemExit as end:
                status = int(end.code or 0)
            for number in ORDERLY:
                signal.signal(number, signal.SIG_IGN)
        except KeyboardInterrupt:  # while the lines above were run
            for number in ORDERLY:
                signal.signal(number, signal.SIG_IGN)
        sys.stdout.flush()
        Path(f"{self.log}.changes").write_text(str(seen))
        os._exit(status)

    def wait(self) -> tuple[int, float, str]:
        """Exit status (minus the signal that ended it), seconds, and what it printed; nothing of it may be left."""
        _, status = os.waitpid(self.pid, 0)
        seconds = time.monotonic() - self.started
        for _ in range(100):  # workers end with their driver
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return os.waitstatus_to_exitcode(status), seconds, self.log.read_text(errors="replace")
            time.sleep(0.1)
        raise AssertionError(f"processes of {self.log} are left over")


def artefacts(out: Path) -> dict[str, str]:
    """What a command left, by name: a hash of the content; reports and what is hidden or scratch left out."""
    found = {}
    for path in sorted(out.rglob("*")):
        parts = path.relative_to(out).parts
        if path.is_dir() or any(p.startswith(".") or p == "stages" for p in parts) or path.name.endswith(".error.json"):
            continue
        if path.name in ("report.html", "env.json", "history.csv"):  # env: versions; history.jsonl has the numbers
            continue
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            text = content.decode()
            rows = [json.loads(text)] if path.suffix == ".json" else [json.loads(row) for row in text.splitlines()]
            content = json.dumps(without_times(rows), sort_keys=True).encode()
        found["/".join(parts)] = hashlib.sha256(content).hexdigest()
    return found


def without_times(value: Any) -> Any:
    """JSON without what differs between two undisturbed runs."""
    if isinstance(value, dict):
        return {key: without_times(v) for key, v in value.items() if key not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def half_made(out: Path, wanted: dict[str, str]) -> list[str]:
    """What looks done and is not: by its content, the report by its end, and result.json by its company."""
    found = artefacts(out)
    wrong = [name for name, content in found.items() if name != "history.jsonl" and wanted.get(name) != content]
    reports = [path for path in out.rglob("report.html") if not path.read_text().rstrip().endswith("</html>")]
    ends = [path for path in out.rglob("*.csv") if not path.read_bytes().endswith(b"\n")]
    if "result.json" in found and not (found.keys() >= wanted.keys() and (out / "report.html").exists()):
        wrong.append("result.json, before all else is there")
    return wrong + [str(path.relative_to(out)) for path in (*reports, *ends)]


def epochs(out: Path) -> int:
    """How many epochs the processes that wrote to `out` began."""
    path = Path(f"{out}.epochs")
    return path.stat().st_size if path.exists() else 0


def left_over(root: Path, out: Path) -> list[str]:
    """Temporary files of this trial that are still there."""
    near = [path for path in root.iterdir() if path.name.startswith(f".{out.name}.")]
    inside = [path for path in out.rglob("*") if path.name.endswith((".part", ".old")) or ".tmp" in path.name]
    return [str(path) for path in (*near, *inside)]


def trial(case: Case, root: Path, rng: random.Random, counts: Counter[str]) -> list[str]:
    """Reference, kills, end; returns what was wrong."""
    wrong: list[str] = []
    checkpoint, struck = rng.choice((-1.0, -1.0, -1.0, 20.0)), 0
    whole, out = root / "whole", root / "cut"
    status, seconds, told = Process(case, whole, checkpoint).wait()
    if status != 0:
        return [f"the undisturbed run ended with {status}: {told[-300:]}"]
    wanted, changes = artefacts(whole), int(Path(f"{whole}.log.changes").read_text())
    for resume in range(3):
        sig = rng.choice((9, 9, 9, 9, signal.SIGTERM, signal.SIGINT))
        at = rng.randrange(changes) if rng.random() < 0.6 else -1
        process = Process(case, out, checkpoint, resume=resume > 0, at=at, sig=sig)
        if at < 0:
            time.sleep(rng.uniform(0, seconds))
            os.kill(process.pid, sig)
        status, _, told = process.wait()
        if status in (0, -sig, STATUS.get(sig)):
            counts[signal.Signals(sig).name if status else "ended first"] += 1
        else:
            wrong.append(f"after {signal.Signals(sig).name} status {status}: {told[-300:]}")
        if status in STATUS.values() and (told.count("\n") != 1 or "Traceback" in told):
            wrong.append(f"no single sentence: {told[-300:]!r}")
        struck += status != 0
        early = half_made(out, wanted)
        wrong += [f"half-made or different after a kill: {sorted(early)}"] * bool(early)
        if status == 0 or (not case.resume and not case.name.startswith("bench") and artefacts(out)):
            break  # also where the kill came just after a folder took its place
    if case.resume or case.name.startswith("bench") or not artefacts(out):
        status, _, told = Process(case, out, checkpoint, resume=True).wait()
        wrong += [f"lost: it does not go on ({status}): {told[-300:]}"] * (status != 0)
    got = artefacts(out)
    again = epochs(out) - epochs(whole)
    if checkpoint < 0 and again > struck:
        wrong.append(f"{struck} kills cost {again} epochs of {epochs(whole)}")
    wrong += [f"different: {sorted(k for k in wanted | got if wanted.get(k) != got.get(k))}"] * (wanted != got)
    return wrong + [f"left over: {path}" for path in left_over(root, out)]


def worker_trial(case: Case, root: Path, rng: random.Random, counts: Counter[str]) -> list[str]:
    """Kill workers under a driver, no more often than it takes; it ends as if nothing had been."""
    whole, out = root / "whole", root / "cut"
    status, seconds, told = Process(case, whole, -1.0).wait()
    if status != 0:
        return [f"the undisturbed run ended with {status}: {told[-300:]}"]
    process = Process(case, out, -1.0)
    for _ in range(2):
        time.sleep(rng.uniform(0, seconds / 2))
        for worker in members(process.pid):
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
                counts["SIGKILL of a worker"] += 1
    status, _, told = process.wait()
    wrong = [f"status {status}: {told[-300:]}"] * (status != 0)
    wanted, got = artefacts(whole), artefacts(out)
    wrong += [f"different: {sorted(k for k in wanted | got if wanted.get(k) != got.get(k))}"] * (wanted != got)
    return wrong + [f"left over: {path}" for path in left_over(root, out)]


def members(group: int) -> list[int]:
    """The other processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            found += [int(path.parent.name)] * (int(fields[2]) == group and int(path.parent.name) != group)
    return found


class Browser:
    """Sends what the review page's script sends."""

    def __init__(self, address: str):
        parts = urlsplit(address)
        self.host, self.root = parts.netloc, parts.path.rstrip("/")

    def ask(self, path: str, body: Any = None) -> Any:
        """The answer as JSON; OSError or HTTPException where the server went away."""
        connection = HTTPConnection(self.host, timeout=20)
        try:
            headers = {"Origin": f"http://{self.host}", "Content-Type": "application/json"}
            post = None if body is None else json.dumps(body)
            connection.request("GET" if post is None else "POST", self.root + path, post, headers)
            answer = connection.getresponse()
            read = answer.read()
            if answer.status != 200:
                raise AssertionError(f"{path}: {answer.status} {read[:200]!r}")
            return json.loads(read)
        finally:
            connection.close()


def page_trial(case: Case, root: Path, rng: random.Random, counts: Counter[str]) -> list[str]:
    """Kill the page while decisions and exports are sent; started again, it knows all that it had acknowledged."""
    assert case.begins is not None
    out, wrong = Path(shutil.copytree(case.begins, root / "cut")), list[str]()
    known, maybe = dict[int, str](), dict[int, str]()
    for turn in range(4):
        sig = rng.choice((9, 9, 9, 9, signal.SIGTERM, signal.SIGINT)) if turn < 3 else signal.SIGTERM
        at = rng.randrange(2, 60) if turn < 3 and rng.random() < 0.6 else -1
        Path(f"{out}.log").unlink(missing_ok=True)  # the address of the last page
        process = Process(case, out, -1.0, at=at, sig=sig)
        browser, end = opened(process), time.monotonic() + rng.uniform(0.1, 1.5)
        with suppress(OSError, HTTPException):
            if browser is not None:
                wrong += forgotten(browser, known, maybe)
            while browser is not None and turn < 3 and (at >= 0 or time.monotonic() < end):
                if rng.random() < 0.1:
                    browser.ask("/api/export", {"form": "npz", "undecided": "keep"})
                    continue
                row, decision = rng.randrange(64), rng.choice(("keep", "drop", "undecided"))
                maybe[row] = decision
                browser.ask("/api/decide", {"row": row, "decision": decision})
                known[row] = maybe.pop(row)
        with suppress(ProcessLookupError):
            os.kill(process.pid, sig)
        status, _, told = process.wait()
        counts[signal.Signals(sig).name] += 1
        if "Traceback" in told or status not in (0, -sig, STATUS.get(sig)):
            wrong.append(f"status {status}: {told[-300:]}")
        if (out / "cleaned-npz").exists() and not len(load(out / "cleaned-npz").train):
            wrong.append("half an export")
    return wrong + [f"left over: {path}" for path in left_over(root, out) if "cleaned-npz" not in path]


def opened(process: Process) -> Browser | None:
    """The page, once it listens; None where it was killed before."""
    for _ in range(2000):
        found = re.search(r"http://\S+", process.log.read_text(errors="replace")) if process.log.exists() else None
        if found:
            return Browser(found[0])
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return None
        time.sleep(0.01)
    raise AssertionError(f"no page: {process.log.read_text(errors='replace')[-300:]}")


def forgotten(browser: Browser, known: dict[int, str], maybe: dict[int, str]) -> list[str]:
    """Decisions that the page does not know any more; those it did not acknowledge may be there or not."""
    wrong = []
    for position in range(64):
        told = browser.ask(f"/api/item/all/{position}")
        row, decision = told["row"], told["decision"]["name"]
        if decision not in (known.get(row, "undecided"), maybe.get(row)):
            wrong.append(f"acknowledged and lost: row {row} is {decision}, not {known.get(row)}")
        known[row] = decision
    maybe.clear()
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=24 * 60, help="begin no trial after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases in whose name this expression is found")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * given.minutes
    rng, counts, problems = random.Random(given.seed), Counter[str](), list[dict[str, str]]()
    trials, struck = Counter[str](), Counter[str]()
    scratch = Path(tempfile.mkdtemp())
    try:
        cases = [case for case in make_cases(scratch) if re.search(given.only, case.name)]
        waiting: list[Case] = []
        while (kills := struck.total()) < given.kills or len(trials) < len(cases):
            if time.monotonic() > end:
                break
            waiting = waiting or rng.sample(cases, len(cases))  # every case once before any twice
            case, root, before = waiting.pop(), Path(tempfile.mkdtemp(dir=scratch)), kills_of(counts)
            wrong = (case.trial or trial)(case, root, rng, counts)
            trials[case.name] += 1
            struck[case.name] += kills_of(counts) - before
            problems += [{"case": case.name, "wrong": text} for text in wrong]
            print(f"{kills:4d} kills  {case.name}  {'; '.join(wrong) or 'same'}", flush=True)
            shutil.rmtree(root)
        missed = sorted(case.name for case in cases if not trials[case.name])
        assert not missed or max(trials.values(), default=1) == 1, "a case came twice before another came once"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    kills = struck.total()
    print(f"{kills} kills in {trials.total()} trials of {len(trials)} cases; {len(problems)} problems")
    if missed or kills < given.kills:
        print(f"too few: {kills} of {given.kills} kills; never reached: {', '.join(missed) or 'none'}")
    if given.out:
        record = {"command": shlex.join(["python", *sys.argv]), "kills": kills, "by_signal": dict(counts)}
        record |= {"trials": dict(sorted(trials.items())), "kills_by_case": dict(sorted(struck.items()))}
        record |= {"never_reached": missed, "problems": problems}
        write_json(given.out, {**record, "environment": environment(make_fabric("cpu"))})
    sys.exit(bool(problems or missed or kills < given.kills))


def kills_of(counts: Counter[str]) -> int:
    """Processes that were struck down."""
    return counts.total() - counts["ended first"]


if __name__ == "__main__":
    main()
