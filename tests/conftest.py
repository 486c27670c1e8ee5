"""One thread: what is trained here is too small to gain from more, and workers share the cores.

pyarrow's own way with memory is to reserve a GiB at its first use, which is all that a hostile file may take.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copies of data go to a folder of the tests, not to that of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANTIBACKDOOR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
