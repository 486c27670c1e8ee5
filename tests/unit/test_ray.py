"""The engine on a real Ray: two raylets on this machine, one of which is killed in the middle."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from antibackdoor.bench.cell import Cell
from antibackdoor.bench.engines import ATTACKS, Event, Here, RayCluster
from antibackdoor.bench.ledger import Ledger, read_ledger
from antibackdoor.bench.run import Watcher, run_cells

CELLS = [
    Cell(
        data="digits",
        train_size=120,
        attack="badnets",
        model="resnet18-w4",
        epochs=150,
        seed=seed,
        defense_options={"recipe.min_steps": 0},
    )
    for seed in range(4)
]


class Heard(Watcher):
    """What the driver was told of every cell."""

    def __init__(self) -> None:
        self.kinds, self.lost = Counter[str](), list[str]()

    def end(self, name: str, event: Event) -> None:
        self.kinds[event.kind] += 1
        self.lost += [name] if event.kind == "lost" else []


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_node_that_is_killed_costs_no_cell_and_doubles_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Ray's workers are processes of their own
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")  # a busy machine takes longer than its half a minute
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    stages, heard = tmp_path / "stages", Heard()
    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        victim = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()

        def running() -> int:
            return sum(any(path.rglob("*.safetensors")) for path in stages.glob("*") if path.name != ATTACKS)

        def kill() -> None:
            """Once both nodes have a cell under way."""
            while running() < 2:
                time.sleep(0.2)
            cluster.remove_node(victim, allow_graceful=False)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        engine = RayCluster(cluster.address)
        assert engine.ray.cluster_resources()["CPU"] == 2
        broken = run_cells(CELLS, Ledger(tmp_path / "ledger"), engine, stages=stages, device="cpu", watcher=heard)
        killer.join(timeout=5)
    finally:
        cluster.shutdown()
    assert not killer.is_alive() and not broken
    assert heard.lost and heard.kinds["done"] == len(CELLS)
    records = read_ledger(tmp_path / "ledger")
    assert sorted(records) == sorted(cell.name() for cell in CELLS)
    assert not list((tmp_path / "ledger").rglob("*.error.json"))
    # What was lost went on elsewhere from its checkpoint, and ends as it would have ended undisturbed.
    (cell,) = (cell for cell in CELLS if cell.name() == heard.lost[0])
    local = Ledger(tmp_path / "local")
    assert not run_cells([cell], local, Here(), stages=tmp_path / "local stages", device="cpu")
    (alone,) = read_ledger(local.folder).values()
    assert alone["history_digest"] == records[cell.name()]["history_digest"]
