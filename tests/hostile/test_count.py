"""How many bad inputs the tables of this folder name, and whether each says which sentence it wants."""

from __future__ import annotations

import ast
import re
from pathlib import Path

FEWEST = 150
VAGUE = {"cannot read", "cannot be read", "cannot", "holds no", "must be", "needs"}


def tables() -> dict[str, dict[str, ast.expr]]:
    """The tables that a test goes through with `parametrize("case", TABLE)`: the name of an input -> its entry."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {
            node.args[1].id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.parametrize"
            if ast.unparse(node.args[0]) == "'case'" and isinstance(node.args[1], ast.Name)
        }
        for node in tree.body:
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.value, ast.Dict)
                and ast.unparse(node.target) in used
            ):
                keys = [ast.literal_eval(key) for key in node.value.keys if key is not None]
                assert len(set(keys)) == len(keys), "a name is there twice; the first of them is never tried"
                found[f"{path.name}: {ast.unparse(node.target)}"] = dict(zip(keys, node.value.values, strict=True))
    return found


def test_there_are_many_named_bad_inputs() -> None:
    refused = {name: table for name, table in tables().items() if not name.endswith("HARMLESS")}
    assert sum(map(len, refused.values())) >= FEWEST
    assert len(refused) >= 12


def test_each_says_what_the_user_is_told() -> None:
    for name, table in tables().items():
        for case, entry in table.items():
            wanted = entry.elts[-1] if isinstance(entry, ast.Tuple) else None
            if isinstance(wanted, ast.Constant) and isinstance(wanted.value, str):
                for part in re.split(r"(?<!\\)\|", wanted.value):
                    words = re.sub(r"\\.|\[.*?\]|[^A-Za-z ]", "", part).strip()
                    assert len(words) >= 4 and words not in VAGUE, f"{name}, {case}: any sentence would do"
