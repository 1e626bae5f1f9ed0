"""Starts the servers, loads them in turn, and draws conclusions: by round, so that a busy minute strikes all alike."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Final

from tests.launch import ROOT, environment, settings, write_config

from .wire import Load, Upstream

CONNECTIONS: Final = 32
_TRIES: Final = 10
_WARM_UP: Final = 0.3


@dataclass(frozen=True, slots=True)
class Case:
    """One row. against: the name of the row it is compared with; aim: the share of its requests a second to reach;
    marker: what every answer's head must hold, so that the row is what it says; code: the folder whose proxy runs."""

    name: str
    server: str
    distinct: bool = False
    stream: bool = False
    marker: bytes = b"200 OK"
    against: str = ""
    aim: float = 0.0
    code: Path = ROOT


EMPTY: Final = Case("empty handler", "empty")
PASS: Final = Case("pass-through", "pass", distinct=True)
HIT: Final = Case("proxy, hit", "proxy", marker=b"X-Proxy-Cache: hit", against=EMPTY.name, aim=0.8)
MISS: Final = Case("proxy, miss", "proxy", True, marker=b"fwd=uri-miss; stored", against=PASS.name, aim=0.6)
STREAM: Final = Case("proxy, stream", "proxy", True, True, marker=b"X-Proxy-Cache: miss")
CASES: Final = (EMPTY, HIT, PASS, MISS, STREAM)


def cases(before: Path | None = None) -> list[Case]:
    """Return the rows. before: another checkout of the repository, whose proxy is measured in the same rounds."""
    if before is None:
        return list(CASES)
    olds = [
        replace(case, name=f"before, {case.name.removeprefix('proxy, ')}", against=case.name, aim=0.0, code=before)
        for case in (HIT, MISS, STREAM)
    ]
    return [*CASES, *olds]


@dataclass(slots=True)
class Row:
    """What was measured, one value a round: requests/s, and CPU microseconds of the server process a request."""

    case: Case
    rate: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    requests: int = 0

    def add(self, answers: int, seconds: float, cpu: float, own_cpu: float) -> None:
        self.requests += answers
        self.rate.append(answers / seconds)
        self.cpu.append(cpu / answers * 1e6)
        self.load.append(own_cpu / seconds)


class Server:
    """A process that serves on a port of the loopback, alone on its core where the system can pin."""

    def __init__(self, argv: Sequence[str], port: int, home: Path, core: int | None, code: Path = ROOT) -> None:
        self.port = port
        self._home = home
        self._env = environment(home, {"PYTHONPATH": str(code)})
        self._argv = [sys.executable, "-m", *argv]
        self._process = subprocess.Popen(
            self._argv,
            cwd=home,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        pin(self._process.pid, core)

    async def listening(self) -> None:
        """Raises RuntimeError when it ends or stays silent."""
        end = time.monotonic() + 30
        while self._process.poll() is None and time.monotonic() < end:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                await asyncio.sleep(0.02)
                continue
            writer.close()
            await writer.wait_closed()
            return
        self.stop()
        raise RuntimeError(f"{' '.join(self._argv)} does not listen: {self._last_words()}")

    def _last_words(self) -> str:
        """What it says when it is started once more: while it is measured, nobody keeps its output."""
        try:
            again = subprocess.run(self._argv, cwd=self._home, env=self._env, capture_output=True, text=True, timeout=5)
        except subprocess.TimeoutExpired:
            return "nothing"
        return again.stderr[-2000:]

    def cpu_seconds(self) -> float:
        """CPU time of the process so far, user and system; NaN where the system does not tell.

        The clock of clock_getcpuclockid(3) on Linux: as /proc/PID/stat, but in nanoseconds instead of ticks of 10 ms.
        """
        try:
            return time.clock_gettime((~self._process.pid << 3) | 2)
        except OSError:
            return float("nan")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def pin(pid: int, core: int | None) -> None:
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(pid, {core})


def cores() -> tuple[int | None, int | None]:
    """(the servers', ours): two different cores, or none where there are none to choose from."""
    ours = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return (ours[0], ours[1]) if len(ours) > 1 else (None, None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(case: Case, upstream: int, home: Path, core: int | None) -> Server:
    port = free_port()
    if case.server == "proxy":
        # Everything as a person gets it, the log at info: it goes to standard error, and so to /dev/null.
        config = write_config(home, settings(upstream, log={"level": "info"}), f"{port}.yaml")
        argv = ["proxy", "serve", "--port", str(port), "--config", str(config)]
    else:
        argv = ["tests.bench.servers", case.server, str(port)]
        if case.server == "pass":
            argv.append(f"http://127.0.0.1:{upstream}")
    return Server(argv, port, home, core, case.code)


async def run(seconds: float, rounds: int, before: Path | None = None) -> list[Row]:
    """Every case `rounds` times for `seconds`, in turn. Raises RuntimeError, OSError or ValueError."""
    server_core, our_core = cores()
    pin(0, our_core)
    rows = [Row(case) for case in cases(before)]
    servers: list[Server] = []
    loads: list[Load] = []
    loop = asyncio.get_running_loop()
    mock = await loop.create_server(Upstream, "127.0.0.1", 0, backlog=1024)
    upstream_port: int = mock.sockets[0].getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="openai-proxy-bench.") as home:
        try:
            for row in rows:
                servers.append(start(row.case, upstream_port, Path(home), server_core))
            for row, server in zip(rows, servers, strict=True):
                await server.listening()
                load = Load(server.port, distinct=row.case.distinct, connections=CONNECTIONS, stream=row.case.stream)
                loads.append(load)
                await load.open()
                for _ in range(_TRIES):  # on a busy machine the first round may end before the first hit
                    await load.run(min(_WARM_UP, seconds), lambda: 0.0)
                    if row.case.marker in load.last:
                        break
                else:
                    raise RuntimeError(f"{row.case.name}: not what it should be: {load.last!r}")
            gc.collect()
            gc.freeze()
            for turn in range(rounds):
                triples = list(zip(rows, servers, loads, strict=True))
                for row, server, load in triples if turn % 2 == 0 else reversed(triples):
                    own = time.process_time()
                    answers, took, cpu = await load.run(seconds, server.cpu_seconds)
                    row.add(answers, took, cpu, time.process_time() - own)
        finally:
            for load in loads:
                load.close()
            for server in servers:
                server.stop()
            mock.close()
    return rows


def ratios(rows: Sequence[Row], row: Row) -> tuple[float, float]:
    """(requests/s, CPU time) of `row` as a share of the row it is compared with: medians over the rounds."""
    base = next(other for other in rows if other.case.name == row.case.against)
    rate = median(mine / theirs for mine, theirs in zip(row.rate, base.rate, strict=True))
    cpu = median(theirs / mine for mine, theirs in zip(row.cpu, base.cpu, strict=True))
    return rate, cpu
