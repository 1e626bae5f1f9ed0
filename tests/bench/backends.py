"""`python -m tests.bench.backends`: hits per backend beside an empty handler, and what an entry costs; about a minute.

"in front" is as the product is: the memory tier answers. "itself" is the slower store's answer, as after a restart: its
memory tier is too small for any entry. It judges nothing: machines and minutes differ.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from tests.cache.stores.kit import Valkey
from tests.launch import settings, write_config

from . import stored
from .measure import CONNECTIONS, Case, Row, Server, cores, free_port, pin, ratios
from .wire import KB, Load, Upstream

SIZES: Final = (1, 28, 278)
_HIT: Final = b"X-Proxy-Cache: hit"
_NO_ROOM: Final = "1KiB"
# Name of the row -> backend, room for the memory tier.
BACKENDS: Final = {
    "memory": ("memory", "256MiB"),
    "sqlite, memory in front": ("sqlite", "256MiB"),
    "redis, memory in front": ("redis", "256MiB"),
    "sqlite itself": ("sqlite", _NO_ROOM),
    "redis itself": ("redis", _NO_ROOM),
}
EMPTY: Final = "empty handler"


@dataclass(slots=True)
class Served(Row):
    """busy, alone: the wait (s) of every request with all connections, and with one. size: bytes of a body; misses:
    answers that were no hits: on a busy machine a store may be later than a request waits for it.
    """

    server: str = ""
    size: int = KB
    misses: int = 0
    busy: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)

    def as_json(self, rows: Sequence[Row]) -> dict[str, Any]:
        told: dict[str, Any] = {
            "backend": self.server,
            "size": self.size,
            "requests": self.requests,
            "misses": self.misses,
            "hits_per_second": median(self.rate),
            "cpu_us": median(self.cpu),
            "p50_ms": share(self.busy, 0.5) * 1000,
            "p99_ms": share(self.busy, 0.99) * 1000,
            "alone_p50_ms": share(self.alone, 0.5) * 1000,
            "alone_p99_ms": share(self.alone, 0.99) * 1000,
        }
        if self.case.against:
            told["ratio"], told["ratio_by_cpu"] = ratios(rows, self)
        return told


def share(waits: list[float], part: float) -> float:
    """The wait that `part` of them do not exceed."""
    return sorted(waits)[min(len(waits) - 1, int(len(waits) * part))]


def start(name: str, upstream: int, redis_url: str, home: Path, core: int | None) -> Server:
    port = free_port()
    if name == EMPTY:
        return Server(["tests.bench.servers", "empty", str(port)], port, home, core)
    backend, room = BACKENDS[name]
    config = settings(
        upstream,
        log={"level": "info"},
        cache={"backend": backend, "path": str(home / f"{port}.db"), "memory_size": room},
        redis={"url": redis_url, "prefix": f"bench{port}"},
    )
    return Server(
        ["proxy", "serve", "--port", str(port), "--config", str(write_config(home, config, f"{port}.yaml"))],
        port,
        home,
        core,
    )


async def hits(redis_url: str, home: Path, seconds: float, rounds: int) -> list[Served]:
    """Every backend with every size, `rounds` times in turn. Raises RuntimeError, OSError or ValueError."""
    server_core, _ = cores()
    mock = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0, backlog=1024)
    upstream: int = mock.sockets[0].getsockname()[1]
    servers: dict[str, Server] = {}
    rows: list[Served] = []
    loads: list[tuple[Load, Load]] = []
    try:
        for name in (EMPTY, *BACKENDS):
            servers[name] = start(name, upstream, redis_url, home, server_core)
        for name, server in servers.items():
            await server.listening()
            for size in SIZES:
                against = "" if name == EMPTY else f"{EMPTY} {size}"
                case = Case(f"{name} {size}", name, against=against)
                rows.append(Served(case, server=name, size=size * KB))
                marker = b"" if name == EMPTY else _HIT
                many, one = (
                    Load(server.port, distinct=False, connections=n, size=size * KB, marker=marker)
                    for n in (CONNECTIONS, 1)
                )
                loads.append((many, one))
                await many.open()
                await one.open()
                end = time.monotonic() + 10
                while name != EMPTY and _HIT not in one.last:  # it is stored, and not only in line to be
                    await one.run(0.1, lambda: 0.0)
                    if time.monotonic() > end:
                        raise RuntimeError(f"{case.name}: no hit: {one.last[:500]!r}")
                await many.run(0.05, lambda: 0.0)  # a connection that says nothing is closed after a while
        gc.collect()
        gc.freeze()
        for turn in range(rounds):
            pairs = list(zip(rows, loads, strict=True))
            for row, (many, one) in pairs if turn % 2 == 0 else reversed(pairs):
                own = time.process_time()
                answers, took, cpu = await many.run(seconds, servers[row.server].cpu_seconds)
                row.add(answers, took, cpu, time.process_time() - own)
                row.busy += many.waits
                row.misses += many.strays
                await one.run(seconds / 3, lambda: 0.0)
                row.alone += one.waits
    finally:
        for pair in loads:
            for load in pair:
                load.close()
        for server in servers.values():
            server.stop()
        mock.close()
    return sorted(rows, key=lambda row: row.size)


def table(rows: Sequence[Served], costs: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'':5} {'':24} {'hits/s':>8} {'p50 ms':>7} {'p99 ms':>7} {'CPU µs':>7}  {'alone p50':>9} {'p99 ms':>7}"
        f"  {'/ empty':>7} {'by CPU':>7}"
    ]
    for row in rows:
        told = row.as_json(rows)
        line = (
            f"{row.size // KB:3} K {row.server:24} {told['hits_per_second']:8,.0f} {told['p50_ms']:7.2f} "
            f"{told['p99_ms']:7.2f} {told['cpu_us']:7.0f}  {told['alone_p50_ms']:9.2f} {told['alone_p99_ms']:7.2f}"
        )
        if row.case.against:
            line += f"  {told['ratio']:7.2f} {told['ratio_by_cpu']:7.2f}"
        if row.misses:
            line += f"  {row.misses / row.requests:.1%} misses"
        lines.append(line)
    lines += ["", f"{'':5} {'':8} {'sets/s':>8} {'gets/s':>8} {'bytes each':>11} {'per GiB':>10}"]
    for cost in costs:
        speed = f"{cost['sets']:8,.0f} {cost['gets']:8,.0f}" if "sets" in cost else f"{'':17}"
        line = f"{cost['size'] // KB:3} K {cost['store']:8} {speed} {cost['bytes']:11,.0f} {cost['per_gib']:10,.0f}"
        if "resident" in cost:
            many, each = cost["entries"], cost["resident"]
            line += f"  {many:,} entries: {each * many / 2**20:,.0f} MiB resident, {each:,.0f} bytes each"
        lines.append(line)
    return "\n".join(lines)


async def measure(server: Valkey, home: Path, args: argparse.Namespace) -> tuple[list[Served], list[dict[str, Any]]]:
    rows = await hits(server.url, home, args.seconds, args.rounds)
    return rows, await stored.figures(home, server, args.entries, args.many)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.backends", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a round of one row (default: 0.5)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of every row (default: 3)")
    parser.add_argument("--entries", type=int, default=5000, help="entries set and got (default: 5000)")
    parser.add_argument("--many", type=int, default=100_000, help="entries in memory (default: 100000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    args = parser.parse_args(argv)
    before = os.getloadavg()[0]
    pin(0, cores()[1])
    server = Valkey()
    try:
        with tempfile.TemporaryDirectory(prefix="openai-proxy-bench.") as home:
            rows, costs = asyncio.run(measure(server, Path(home), args))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"the benchmark broke: {error}", file=sys.stderr)
        return 1
    finally:
        server.remove()
    if args.json is not None:
        args.json.write_text(json.dumps({"hits": [row.as_json(rows) for row in rows], "entries": costs}, indent=2))
    print(table(rows, costs))
    print(
        f"\nrequest and answer of that size, the same again and again; {CONNECTIONS} connections, alone: one; "
        f"{args.rounds} rounds of {args.seconds:g} s, in turn\nRedis: {Path(server._argv[0]).name} on a unix socket, "
        f"on the load's core; bytes each: file (zstd), used_memory, own account; "
        f"load average {before:.2f} before, {os.getloadavg()[0]:.2f} after"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
