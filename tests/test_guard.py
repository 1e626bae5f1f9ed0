"""A fast test that opens a socket or starts a process fails, and says what to do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT

TESTS = """
import asyncio, socket, subprocess, sys, threading
import pytest

START = [sys.executable, "-c", ""]

def test_process():
    subprocess.run(START)

def test_hidden_connection():
    try:
        socket.create_connection(("127.0.0.1", 1))
    except Exception:
        pass

def test_hidden_in_a_thread():
    thread = threading.Thread(target=test_hidden_connection)
    thread.start()
    thread.join()

def test_listener(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))

async def test_event_loop_and_pair():
    for end in socket.socketpair():
        end.close()
    await asyncio.to_thread(len, "")

@pytest.mark.slow
def test_marked():
    subprocess.run(START)

def test_by_fixture(upstream):
    pass
"""


@pytest.mark.slow
def test_sockets_and_processes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS, encoding="utf-8")
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-c", "pyproject.toml", "-rA", "--tb=line"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    seen = {(outcome, name) for outcome, name in re.findall(r"^(PASSED|FAILED|ERROR) .*::(\w+)", done.stdout, re.M)}
    refused = ("test_process", "test_hidden_connection", "test_hidden_in_a_thread", "test_listener")
    passed = ("test_event_loop_and_pair", "test_marked", "test_by_fixture")
    # What the test hid shows when it is torn down.
    assert {name for outcome, name in seen if outcome == "ERROR"} == set(refused), done.stdout
    assert {name for outcome, name in seen if outcome == "FAILED"} == {"test_process", "test_listener"}
    assert {("PASSED", name) for name in passed} <= seen
    assert "mark this test with `@pytest.mark.slow`" in done.stdout
