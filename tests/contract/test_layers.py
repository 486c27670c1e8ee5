"""What the source text promises: imports go one way, a defender never names the truth, nothing loads code as data."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import antibackdoor
from antibackdoor.attacks import ATTACKS
from antibackdoor.defenses import DEFENSES
from antibackdoor.detectors import DETECTORS

ROOT = Path(antibackdoor.__file__).parent
FILES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}

LAYERS = [
    {"errors"},
    {"limits"},
    {"settings"},
    {"files", "intervals", "options", "registry", "seeds"},
    {"data"},
    {"models"},
    {"training"},
    {"attacks"},
    {"defenses"},
    {"evidence", "threats"},
    {"verdict"},
    {"detectors"},
    {"attention", "environment", "tracking"},
    {"bench"},
    {"report"},
    {"runs"},
    {"findings", "opening"},
    {"api", "scanning"},
    {"doctor", "estimator", "exports", "listing", "progress", "review", "summary"},
    {"demo"},
    {"cli"},
]
"""From the ground up: a room may import the rooms of lower layers, and itself."""

RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
PUBLIC = {name: place.split(".")[0] for name, place in antibackdoor._ROOMS.items()}
"""What `from antibackdoor import name` leads to."""
BLIND = {"attention", "models", "training", "detectors", "defenses", "evidence", "verdict"}
"""Rooms of the defender."""
HELPERS = {
    "attacks": {"base", "generator", "stamp", "surrogate"},
    "defenses": {
        "base",
        "company",
        "deposition",
        "disarming",
        "dual_head",
        "hearing",
        "judgement",
        "suspects",
        "trap",
        "witness",
    },
    "detectors": {"base"},
}
HEAVY = {"sklearn", "scipy", "torchvision", "timm", "pyarrow", "onnx", "onnxruntime", "ray", "aeon"}
"""Take a second or more to load, and most commands need none of them."""
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "os.system", "torch.load", "yaml.load", "pd.read_pickle", "pandas.read_pickle"}
UNSAFE_KEYWORDS = {("allow_pickle", True), ("shell", True), ("weights_only", False)}


def room_of(file: str) -> str:
    return file.split("/", maxsplit=1)[0].removesuffix(".py")


def imports(source: str) -> Iterator[str]:
    """Dotted names of all modules imported anywhere but under `if TYPE_CHECKING:`; `from a import b` gives "a.b"."""
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting += ast.iter_child_nodes(node)


def upward(file: str, source: str) -> list[str]:
    """Imports of rooms that lie above the file's own."""
    names = [name.split(".")[1] for name in imports(source) if name.startswith("antibackdoor.")]
    rooms = [PUBLIC.get(name, name) for name in names if name != "__version__"]
    own = room_of(file)
    return [room for room in rooms if room != own and RANK[room] >= RANK[own]]


def names_truth(source: str) -> bool:
    """Whether the code, docstrings apart, speaks of `Truth` or of the module that reads it."""
    names = set(imports(source))
    for node in ast.walk(ast.parse(source)):
        names |= {node.id} if isinstance(node, ast.Name) else set()
        names |= {node.attr} if isinstance(node, ast.Attribute) else set()
    return any({"Truth", "truth", "read_truth"} & set(name.split(".")) for name in names)


def unsafe(source: str) -> list[str]:
    """What could run code out of a file that was given as data."""
    found = [name for name in imports(source) if name.split(".")[0] in UNSAFE_MODULES]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found += [called] if called in UNSAFE_CALLS else []
            values = [(k.arg, k.value.value) for k in node.keywords if isinstance(k.value, ast.Constant)]
            found += [f"{called}({name}={value})" for name, value in values if (name, value) in UNSAFE_KEYWORDS]
    return found


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_imports_go_down(file: str) -> None:
    assert room_of(file) in RANK, "give this room a place in LAYERS"
    assert upward(file, FILES[file]) == []


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) in BLIND])
def test_a_defender_never_names_the_truth(file: str) -> None:
    assert not names_truth(FILES[file])


@pytest.mark.parametrize("file", FILES)
def test_nothing_loads_code_as_data(file: str) -> None:
    assert unsafe(FILES[file]) == []


@pytest.mark.parametrize("file", [file for file in FILES if file != "estimator.py"])
def test_what_takes_long_to_load_waits_for_its_use(file: str) -> None:
    at_once = [node for node in ast.parse(FILES[file]).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not {name.split(".")[0] for node in at_once for name in imports(ast.unparse(node))} & HEAVY


@pytest.mark.parametrize("file", [file for file, source in FILES.items() if source.strip()])
def test_every_module_says_what_it_is(file: str) -> None:
    assert ast.get_docstring(ast.parse(FILES[file]))


@pytest.mark.parametrize(("room", "registry"), [("attacks", ATTACKS), ("defenses", DEFENSES), ("detectors", DETECTORS)])
def test_every_method_is_registered(room: str, registry: object) -> None:
    modules = {Path(file).stem for file in FILES if room_of(file) == room} - {"__init__"} - HELPERS[room]
    registered = {entry.make.__module__ for entry in registry}  # type: ignore[attr-defined]
    assert modules and registered == {import_module(f"antibackdoor.{room}.{module}").__name__ for module in modules}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from joblib import load",
        "import torch\ntorch.load('x')",
        "np.load(f, allow_pickle=True)",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_the_search_for_unsafe_calls_finds(source: str) -> None:
    assert unsafe(source)
    assert not unsafe("model.eval()\nnp.load(f, allow_pickle=False)\nload_file(f)")


def test_the_search_for_upward_imports_finds() -> None:
    source = "def f():\n    from antibackdoor.bench.judge import share"
    assert upward("training/loop.py", source) == ["bench"]
    assert upward("api.py", source) == []
    assert upward("bench/cell.py", "from antibackdoor import train") == ["api"]
    assert upward("training/loop.py", "if TYPE_CHECKING:\n    from antibackdoor.api import train") == []
    assert names_truth("from antibackdoor.data.core import Truth") and names_truth("def f(x: core.Truth): pass")
    assert not names_truth('"""The truth."""')
