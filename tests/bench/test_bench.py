"""The benchmark itself lives. Its figures are for people: no test depends on the speed of a machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.launch import ROOT


def test_runs_from_its_one_command(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--seconds", "0.1", "--rounds", "1", "--json", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "proxy, miss" in done.stdout
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["empty handler", "proxy, hit", "pass-through", "proxy, miss"]
    assert all(row["requests"] > 0 for row in rows.values())
    assert {row["against"] for row in rows.values() if "against" in row} == {"empty handler", "pass-through"}
