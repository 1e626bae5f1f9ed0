"""The benchmark itself lives. Its figures are for people: no test depends on the speed of a machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.launch import ROOT

from .backends import BACKENDS, EMPTY, SIZES


def test_runs_from_its_one_command(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    little = ["--seconds", "0.1", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", *little, "--before", str(ROOT), "--json", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "proxy, miss" in done.stdout
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    ours = ["empty handler", "proxy, hit", "pass-through", "proxy, miss", "proxy, stream"]
    assert list(rows) == [*ours, "before, hit", "before, miss", "before, stream"]
    assert all(row["requests"] > 0 for row in rows.values())
    against = {row["against"] for row in rows.values() if "against" in row}
    assert against == {"empty handler", "pass-through", "proxy, hit", "proxy, miss", "proxy, stream"}


def test_backends_run_from_their_one_command(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    little = ["--seconds", "0.05", "--rounds", "1", "--entries", "50", "--many", "500"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.backends", *little, "--json", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "redis, memory in front" in done.stdout
    told = json.loads(file.read_text())
    assert {(row["backend"], row["size"] // 1024) for row in told["hits"]} == {
        (name, size) for name in (EMPTY, *BACKENDS) for size in SIZES
    }
    assert all(row["hits_per_second"] > 0 and row["p99_ms"] >= row["p50_ms"] > 0 for row in told["hits"])
    assert [(row["store"], row["size"]) for row in told["entries"]] == [
        (store, size) for size in (1024, 2048) for store in ("sqlite", "redis", "memory")
    ]
    assert all(row["per_gib"] > 0 for row in told["entries"])
