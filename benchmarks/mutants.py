"""Mutation testing: changes one operator or number of a module at a time, and asks whether its tests notice.

    python benchmarks/mutants.py --minutes 20 --out results/trust/mutants.json

Mutants: comparisons, arithmetic, and/or, &/|, not and ~ and minus dropped, numbers one higher, True and False swapped,
calls and changes in place left out. Those that no test can tell apart, as in annotations, docstrings and messages, are
not made. The status is 1 where fewer than `--least` percent of those that were run are noticed. Every mutant runs in a
process forked from one that has torch and pytest, but not this package, imported: mutmut and cosmic-ray start an
interpreter for each, which here costs more than the tests.
"""

from __future__ import annotations

import argparse
import ast
import importlib.machinery
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning_fabric  # noqa: F401 (imported before the fork, as what follows)
import pandas as pd  # noqa: F401
import pydantic  # noqa: F401
import pytest
import sklearn.metrics  # noqa: F401
import sybil  # noqa: F401
import torch
import torchvision  # noqa: F401

ROOT = Path(__file__).parents[1]
TARGETS = {
    "bench/judge.py": ["test_judge.py", "test_dlp.py::test_selections_are_measured"],
    "bench/detection.py": ["test_detection.py"],
    "bench/stealth.py": ["test_stealth.py"],
    "intervals.py": ["test_jury.py"],
    "training/ranking.py": ["test_ranking.py", "test_jury.py"],
    "training/groups.py": ["test_groups.py", "test_jury.py"],
    "defenses/dual_head.py": ["test_partition.py", "test_training.py"],
    "defenses/trap.py": ["test_partition.py", "test_training.py"],
    "defenses/suspects.py": ["test_partition.py"],
    "defenses/deposition.py": ["test_jury.py"],
    "defenses/hearing.py": ["test_jury.py"],
    "defenses/judgement.py": ["test_jury.py"],
    "defenses/company.py": ["test_company.py", "test_partition.py"],
}
"""Module: the tests in `tests/unit` that must notice. Metrics, ranking, partition, and which labels are given back."""
DROPPED = object()
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, Any]]:
    """(node, field, new value) of every mutant, in a fixed order."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        out = [getattr(node, name, None) for name in ("annotation", "returns")]
        if isinstance(node, ast.AnnAssign | ast.Raise | ast.Assert) and not isinstance(node, ast.AnnAssign):
            out.append(node)
        for part in out:
            skipped |= {id(inner) for inner in ast.walk(part)} if part is not None else set()
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node, "", DROPPED
        if isinstance(node, ast.AugAssign) or (
            isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript)
        ):
            yield node, "", DROPPED
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            yield node, "ops", [SWAPS[type(node.ops[0])](), *node.ops[1:]]
        elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
            yield node, "op", SWAPS[type(node.op)]()
        elif isinstance(node, ast.UnaryOp):
            yield node, "op", ast.UAdd() if isinstance(node.op, ast.USub) else None
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, "value", not node.value
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield node, "value", node.value + 1


def mutate(source: str, number: int) -> tuple[str, str]:
    """The source with one change, and what was changed."""
    tree = ast.parse(source)
    node, field, new = list(places(tree))[number]
    before, line = ast.unparse(node), getattr(node, "lineno", 0)
    if new is DROPPED:
        node.__class__, node.__dict__ = ast.Pass, {"lineno": line}
    elif new is None:  # not x, ~x: become x, wrapped so that precedence stays
        assert isinstance(node, ast.UnaryOp)
        wrapped = ast.Call(ast.Name("bool" if isinstance(node.op, ast.Not) else "abs", ast.Load()), [node.operand], [])
        if isinstance(node.op, ast.Invert):
            wrapped = ast.Call(ast.Attribute(node.operand, "clone", ast.Load()), [], [])
        node.__class__, node.__dict__ = wrapped.__class__, {**wrapped.__dict__, "lineno": node.lineno}
    else:
        setattr(node, field, new)
    ast.fix_missing_locations(tree)
    return ast.unparse(tree), f"line {line}: {before}  ->  {ast.unparse(node)}"


def survives(path: Path, changed: str, tests: list[str], seconds: float) -> bool:
    """Whether all tests pass with this text in place of the file's."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        plain = importlib.machinery.SourceFileLoader.get_code

        def get_code(self: Any, name: str) -> Any:
            return compile(changed, str(path), "exec") if self.path == str(path) else plain(self, name)

        importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
        # Without the plugin of hypothesis, which imports all of it at the end of every run, as long as that takes.
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        plugins = ["-p", "no:cacheprovider", "-p", "xdist.plugin", "-p", "pytest_timeout"]
        files = [str(ROOT / "tests" / "unit" / name) for name in tests]
        os._exit(int(pytest.main(["-x", "-q", *plugins, "--rootdir", str(ROOT), *files])))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--least", type=float, default=85, help="percent")
    parser.add_argument("--only", default="", help="modules whose path holds this")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.chdir(ROOT)
    end, waiting, results = time.monotonic() + 60 * given.minutes, [], {}
    for name, tests in TARGETS.items():
        if given.only not in name:
            continue
        path = ROOT / "src" / "antibackdoor" / name
        started = time.monotonic()
        assert survives(path, path.read_text(encoding="utf-8"), tests, 600), f"the tests of {name} fail as it is"
        seconds = 60 + 5 * (time.monotonic() - started)
        count = len(list(places(ast.parse(path.read_text(encoding="utf-8")))))
        results[name] = {"mutants": count, "run": 0, "killed": 0, "survivors": []}
        waiting += [(name, number, seconds) for number in range(count)]
    for name, number, seconds in random.Random(0).sample(waiting, len(waiting)):
        if time.monotonic() > end:
            break
        path, found = ROOT / "src" / "antibackdoor" / name, results[name]
        changed, told = mutate(path.read_text(encoding="utf-8"), number)
        alive = survives(path, changed, TARGETS[name], seconds)
        found["run"] += 1
        found["killed"] += not alive
        found["survivors"] += [told] * alive
        print(f"{'SURVIVED' if alive else 'killed  '}  {name} {told}", flush=True)
    run, killed = (sum(found[key] for found in results.values()) for key in ("run", "killed"))
    print(f"{killed} of {run} mutants killed, {sum(found['mutants'] for found in results.values())} there are")
    for name, found in results.items():
        print(f"  {name}: {found['killed']} of {found['run']}, of {found['mutants']}")
    if given.out:
        from antibackdoor.files import write_json

        write_json(given.out, {"command": shlex.join(["python", *sys.argv]), "run": run, "killed": killed, **results})
    sys.exit(killed < given.least / 100 * run)


if __name__ == "__main__":
    main()
