"""The command line as a function, and a folder of toy images."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from antibackdoor.cli import app
from toy_files import Run, write_images


@pytest.fixture
def run() -> Run:
    def invoke(*words: object, status: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(word) for word in words])
        if result.exit_code != status:
            raise AssertionError(
                f"status {result.exit_code}, expected {status}:\n{result.output}"
            ) from result.exception
        assert "Traceback" not in result.output
        return result

    return invoke


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with 60 training and 15 test images of three classes that color tells apart."""
    write_images(tmp_path / "data" / "train")
    write_images(tmp_path / "data" / "test", count=5)
    return tmp_path / "data"
