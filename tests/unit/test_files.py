from __future__ import annotations

import math
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from antibackdoor.errors import InputError
from antibackdoor.files import append_to, at_once, atomically, load_state, read_json, save_state, write_json, write_text
from antibackdoor.seeds import derive, generator


def failing(error: Exception) -> Any:
    def write(part: Path) -> None:
        part.write_text("half")
        raise error

    return write


@pytest.mark.parametrize(
    ("error", "seen"), [(OSError(28, "No space left"), InputError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: Exception, seen: type[BaseException]
) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(seen):
        atomically(path, failing(error))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_the_file(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write_text(tmp_path / "file", text)
    assert (tmp_path / "file").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_what_is_written_outlasts_the_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is flushed before it takes its place, and the folder after."""
    steps: list[str] = []

    def noted(name: str, real: Any) -> Any:
        def call(*given: Any) -> Any:
            folder = name == "fsync" and stat.S_ISDIR(os.fstat(given[0]).st_mode)
            steps.append("flush folder" if folder else {"fsync": "flush file"}.get(name, name))
            return real(*given)

        return call

    monkeypatch.setattr(os, "fsync", noted("fsync", os.fsync))
    monkeypatch.setattr(os, "sync", noted("flush all", os.sync))
    for name in ("replace", "rename"):
        monkeypatch.setattr(Path, name, noted(name, getattr(Path, name)))
    write_text(tmp_path / "file", "text")
    append_to(tmp_path / "log").close()
    assert steps == ["flush file", "replace", "flush folder", "flush folder"]
    with at_once(tmp_path / "out") as part:
        (part / "a").touch()
        steps.clear()
    assert steps == ["flush all", "rename", "flush folder"]


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        write_text(tmp_path / "no" / "file", "text")


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, None, "ä"]})
    assert read_json(path) == {"a": [1, None, "ä"]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": math.nan})
    assert read_json(path) == {"a": [1, None, "ä"]}
    path.write_text("{")
    with pytest.raises(InputError, match="cannot read"):
        read_json(path)
    with pytest.raises(InputError, match="does not exist"):
        read_json(tmp_path / "none.json")


def test_a_stored_state_does_not_share_memory_and_takes_any_layout(tmp_path: Path) -> None:
    x = torch.arange(24.0).reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    save_state(tmp_path / "s", {"x": x, "view": x[:, 1], "again": x, "none": torch.zeros(0, 3), "bf": x.bfloat16()})
    back = load_state(tmp_path / "s")
    assert torch.equal(back["x"], x) and torch.equal(back["view"], x[:, 1]) and torch.equal(back["again"], x)
    assert back["none"].shape == (0, 3) and back["bf"].dtype == torch.bfloat16


def test_keys_keep_their_type(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {0: "number", "0": "text"})
    assert load_state(tmp_path / "s") == {0: "number", "0": "text"}


def damaged(path: Path, how: str) -> None:
    if how == "missing":
        return
    save_state(path, {"x": torch.zeros(100)})
    whole = path.read_bytes()
    if how == "cut":
        path.write_bytes(whole[:-50])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_bytes(b"not a state at all")
    elif how == "no tree":
        save_file({"0": torch.zeros(1)}, path)
    else:
        metadata = {"no tensor": '{"tensor": "7"}', "no JSON": "{", "no node": "5", "no such node": "{}"}[how]
        save_file({"0": torch.zeros(1)}, path, metadata={"tree": metadata})


@pytest.mark.parametrize(
    "how", ["missing", "cut", "empty", "text", "no tree", "no tensor", "no JSON", "no node", "no such node"]
)
def test_a_damaged_state_is_told(tmp_path: Path, how: str) -> None:
    damaged(tmp_path / "state", how)
    with pytest.raises(InputError, match="delete it to start that stage again"):
        load_state(tmp_path / "state")


def test_derived_seeds_are_fixed_for_good() -> None:
    assert derive(0) == 2033344993903900207 and derive(0, "warm-up", 3) == 2970824054923327569
    assert derive(0, "warm-up", 3) != derive(0, "warm-up", 4) != derive(1, "warm-up", 4)
    assert derive(0, "a", "b") != derive(0, "ab") and 0 <= derive(0, "x") < 2**63
    assert torch.equal(torch.rand(3, generator=generator(5, "x")), torch.rand(3, generator=generator(5, "x")))
