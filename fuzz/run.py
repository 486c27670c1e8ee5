"""Fuzz the readers: `python fuzz/run.py --seconds 60 --out FILE.json [TARGET ...]`.

Each target runs in a process of its own, in turns. The parent starts it again where it dies, keeps the input that it
died of, and counts. Guided by coverage where `atheris` is installed, else by blind mutation of the corpus. In both
cases an input may take five seconds, and a process one GiB beyond what it had before the first; that there was no more
counts as broken, also where a reader made a sentence of it. The parent ends a target that stands still. Counts are
added to those that FILE.json holds already; calls for different targets may write to it side by side. Inputs that broke
something stay in the folder `--work`. Where anything broke, the exit status is 1.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shortage import short_of_memory

HERE = Path(__file__).resolve().parent
os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
"""By its own, pyarrow reserves a GiB at its first use, which is all that an input may take."""
SECONDS, BYTES, LONGEST, PATIENCE = 5, 2**30, 2**16, 60
"""Of computing for an input; beyond what a process had; of an input; seconds for one in which nothing is computed."""
TEXTS = {"arff", "manifest", "recording", "review", "run_history", "run_suspects", "table", "ts", "tsv", "truth"}
LONG = 2**19
"""Bytes of an input for readers of text, which grow with its lines: 131,072 series of one value take a second."""
TOKENS = [
    b"\x00",
    b"\xff" * 4,
    b"\xff\xff\xff\x7f",
    b"-1",
    b"99999999999",
    b"nan",
    b"1e999",
    b"\n",
    b",",
    b":",
    b"?",
    b"[" * 200,
    b"{",
    b'"',
    b"'",
    b"\\",
    b"@data\n",
    b"../",
    b"\x80\x04.",
    b"true",
    b"(1,)",
    b"O",
    b"=",
    b"inf",
]


def longest(target: str) -> int:
    """Bytes of an input for a target."""
    return LONG if target in TEXTS else LONGEST


def mutated(seeds: list[bytes], rng: random.Random, limit: int = LONGEST) -> bytes:
    """A seed with some of its bytes changed, cut, repeated (up to `limit` bytes), or taken from another seed."""
    out = bytearray(rng.choice(seeds))
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        place, size = rng.randrange(len(out) + 1), rng.choice([1, 1, 2, 4, 16, 64])
        match rng.randrange(7):
            case 0 if out:
                out[place % len(out)] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[place % len(out)] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
            case 2:
                del out[place : place + size]
            case 3:
                often = limit // size if rng.random() < 0.02 else rng.choice([1, 2, 30])
                out[place:place] = out[place : place + size] * often
            case 4:
                out[place:place] = rng.choice(TOKENS)
            case 5:
                out[place : place + size] = rng.choice(TOKENS)
            case _:
                other = rng.choice(seeds)
                start = rng.randrange(len(other) + 1)
                out[place : place + size] = other[start : start + size * 4]
    return bytes(out[:limit])


def seeds_of(target: str) -> list[bytes]:
    """The corpus of a target; `damaged` files once broke it."""
    return [path.read_bytes() for path in sorted((HERE / "corpus" / target).iterdir())]


class Hang(BaseException):
    """More than five seconds; no `except Exception` may swallow it."""


class Counted:
    """A target that counts, and writes down what is neither InputError nor success."""

    def __init__(self, target: str, folder: Path):
        from targets import TARGETS

        self.call, self.folder, self.executions, self.found = TARGETS[target], folder, 0, dict[str, str]()
        self.slowest, self.refused, self.told = 0.0, 0, time.monotonic()
        status = Path("/proc/self/status").read_text()
        now = int(re.findall(r"VmData:\s+(\d+)", status)[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (now + BYTES, resource.RLIM_INFINITY))
        self.start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.signal(signal.SIGPROF, self._late)

    def _late(self, *_: object) -> None:
        raise Hang

    def __call__(self, content: bytes) -> None:
        """One execution."""
        from antibackdoor.errors import InputError

        (self.folder / "current").write_bytes(content)
        begun = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of computing: others may share the machine
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.call(content)
        except InputError as error:
            self.refused += 1
            if short_of_memory(error):
                self._note(f"no memory left: {error!s:.80}", content)
            if not str(error).isprintable():
                self._note("a sentence that is not one visible line", content)
        except (Hang, Exception) as error:
            where = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in where if "antibackdoor" in frame.filename] or where[-1:]
            self._note(
                f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}: {error!s:.80}", content
            )
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        spent = time.process_time() - begun
        if spent > self.slowest:
            self.slowest = spent
            (self.folder / "slowest").write_bytes(content)
        if spent > SECONDS:
            self._note(f"a hang of {spent:.0f} s", content)
        self.executions += 1
        if time.monotonic() - self.told > 1:
            self.tell()

    def _note(self, what: str, content: bytes) -> None:
        key = re.sub(r"0x[0-9a-f]+|\d{4,}", "#", what)
        if key not in self.found and len(self.found) < 100:
            self.found[key] = what
            (self.folder / f"found-{len(self.found)}-{os.getpid()}").write_bytes(content)

    def tell(self) -> None:
        """What is known so far, for the parent."""
        self.told = time.monotonic()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        told = {
            "executions": self.executions,
            "refused": self.refused,
            "slowest_seconds": round(self.slowest, 3),
            "start_rss_mib": self.start // 1024,
            "peak_rss_mib": peak // 1024,
            "found": list(self.found.values()),
        }
        (self.folder / f"told-{os.getpid()}.json").write_text(json.dumps(told))


def child(target: str, folder: Path, seconds: int, seed: int, guided: bool) -> None:
    """Run one target until the time is over."""
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    counted, seeds, kept = Counted(target, folder), seeds_of(target), folder / "corpus"
    rng, begun = random.Random(seed), time.monotonic()
    while guided and target in TEXTS and time.monotonic() - begun < seconds / 4:
        counted(mutated(seeds, rng, LONG))  # long ones blindly: those that libFuzzer keeps, it keeps in memory
    if guided:
        import atheris

        kept.mkdir(exist_ok=True)
        for number, content in enumerate(seeds):
            (kept / f"seed-{number}").write_bytes(content)
        arguments = [
            f"-max_total_time={max(1, seconds - int(time.monotonic() - begun))}",
            f"-max_len={LONGEST}",
            f"-seed={seed}",
            "-rss_limit_mb=0",
        ]
        atheris.Setup([target, *arguments, "-timeout=600", "-verbosity=0", str(kept)], counted)
        atheris.Fuzz()  # does not come back
    for content in seeds:
        counted(content)
    while time.monotonic() - begun < seconds:
        counted(mutated(seeds, rng, longest(target)))
    counted.tell()


def fuzz(target: str, folder: Path, seconds: int, seed: int, guided: bool) -> tuple[list[str], float]:
    """One target for so long, started again where it dies; what it died of, and the time that the processor spent."""
    folder.mkdir(parents=True, exist_ok=True)
    begun, deaths, spent = time.monotonic(), list[str](), 0.0
    while (left := int(seconds - (time.monotonic() - begun))) > 0 and len(deaths) < 20:
        pid = os.fork()
        if pid == 0:
            try:
                child(target, folder, left, seed + len(deaths), guided)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        status, usage, stood = waited(pid, folder / "current")
        spent += usage.ru_utime + usage.ru_stime
        if status != 0 or stood:
            name = f"died-{pid}"
            if (folder / "current").exists():
                shutil.copyfile(folder / "current", folder / name)
            said = (folder / "stderr").read_text(errors="replace")[-200:] if (folder / "stderr").exists() else ""
            deaths.append(f"status {status}, {name}: {f'it stood still for {PATIENCE} s' if stood else said}")
    return deaths, spent


def waited(pid: int, current: Path) -> tuple[int, resource.struct_rusage, bool]:
    """How a process ended and what it cost; one that has had the same input for too long is ended (the last part)."""
    begun, stood = time.time(), False
    while True:
        ended, status, usage = os.wait4(pid, 0 if stood else os.WNOHANG)
        if ended:
            return status, usage, stood
        last = current.stat().st_mtime if current.exists() else begun
        if time.time() - max(begun, last) > PATIENCE and not computes(pid):
            stood = True
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def computes(pid: int) -> bool:
    """Whether a process runs or, where others leave it no processor, would: it does not wait for anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "R"


def numbers(target: str, folder: Path, before: dict[str, Any]) -> dict[str, Any]:
    """What all processes of a target told, together, and what a call before this one told."""
    told = [json.loads(path.read_text()) for path in folder.glob("told-*")]
    growth = [part["peak_rss_mib"] - part["start_rss_mib"] for part in told]
    return {
        "target": target,
        "executions": before["executions"] + sum(part["executions"] for part in told),
        "refused": before["refused"] + sum(part["refused"] for part in told),
        "slowest_seconds": max([before["slowest_seconds"], *(part["slowest_seconds"] for part in told)]),
        "most_growth_mib": max([before["most_growth_mib"], *growth]),
        "found": sorted({*before["found"], *(text for part in told for text in part["found"])}),
    }


NOTHING = {"executions": 0, "refused": 0, "slowest_seconds": 0, "most_growth_mib": 0, "found": []}
NOTHING |= {"cpu_seconds": 0, "deaths": []}


def broken(row: dict[str, Any]) -> int:
    """How many things broke in a target."""
    return len(row["found"]) + len(row["deaths"]) + (row["most_growth_mib"] > BYTES // 2**20)


def rows_in(out: Path | None) -> dict[str, dict[str, Any]]:
    """The rows that a record holds already."""
    return {row["target"]: row for row in json.loads(out.read_text())["targets"]} if out and out.exists() else {}


def kept(rows: dict[str, dict[str, Any]], out: Path | None, guided: bool) -> dict[str, Any]:
    """The record with these rows in place of its own of the same targets, written to `out`."""
    with (out.with_suffix(".lock") if out else Path(os.devnull)).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = rows_in(out) | rows
        told = {
            "engine": "atheris (libFuzzer, guided by coverage)" if guided else "blind mutation",
            "executions": sum(row["executions"] for row in rows.values()),
            "cpu_seconds": round(sum(row["cpu_seconds"] for row in rows.values())),
            "broken": sum(broken(row) for row in rows.values()),
            "targets": [rows[name] for name in sorted(rows)],
        }
        if out:
            out.write_text(json.dumps(told, indent=1) + "\n")
    return told


def main() -> None:
    """All targets in turns, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[[], *sorted(path.name for path in (HERE / "corpus").iterdir())])
    parser.add_argument("--seconds", type=int, default=600, help="in all")
    parser.add_argument("--turn", type=int, default=20, help="seconds of a target before it is another's turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--work", type=Path, default=Path("fuzz-work"))
    parser.add_argument("--nice", type=int, default=0, help="lower priority, once everything is loaded")
    parser.add_argument("--blind", action="store_true", help="without coverage, also where atheris is installed")
    given = parser.parse_args()
    guided = not given.blind and find_spec("atheris") is not None
    prepare(guided)
    os.nice(given.nice)
    names = given.targets or sorted(path.name for path in (HERE / "corpus").iterdir())
    before = {name: rows_in(given.out).get(name, {"target": name, **NOTHING}) for name in names}
    for path in (path for name in names for path in (given.work / name).glob("told-*")):
        path.unlink()  # of a call before this one
    rows = dict(before)
    end, turn = time.monotonic() + given.seconds, 0
    while turn == 0 or time.monotonic() < end:
        name, seed = names[turn % len(names)], given.seed + 1000 * turn
        died, cost = fuzz(name, given.work / name, given.turn, seed, guided)
        rows[name] = {
            **numbers(name, given.work / name, before[name]),
            "cpu_seconds": round(rows[name]["cpu_seconds"] + cost, 1),
            "deaths": rows[name]["deaths"] + died,
        }
        told, turn = kept(rows, given.out, guided), turn + 1
    print(json.dumps(told, indent=1))
    sys.exit(1 if told["broken"] else 0)


def prepare(guided: bool) -> None:
    """Load everything once, with counters in the readers' code; the processes of the targets are copies of this one."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(HERE))
    if guided:
        import atheris

        with atheris.instrument_imports(include=["antibackdoor", "PIL", "tarfile", "zipfile", "tomllib"]):
            import targets
    else:
        import targets
    assert set(targets.TARGETS) == {path.name for path in (HERE / "corpus").iterdir()}


if __name__ == "__main__":
    main()
