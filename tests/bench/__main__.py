"""`python -m tests.bench`: one table, one run, about 50 s. It judges nothing: machines and minutes differ."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import aiohttp

from .measure import CONNECTIONS, Row, cores, ratios, run
from .wire import EVENTS


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a round of one row (default: 1.5)")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of every row (default: 6)")
    parser.add_argument("--before", type=Path, metavar="DIR", help="also measure the proxy of this checkout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every round's figures there")
    args = parser.parse_args(argv)
    pinned = None not in cores()
    before = os.getloadavg()[0]
    try:
        rows = asyncio.run(run(args.seconds, args.rounds, args.before and args.before.resolve()))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"the benchmark broke: {error}", file=sys.stderr)
        return 1
    machine = {
        "python": platform.python_version(),
        "aiohttp": aiohttp.__version__,
        "loop": "asyncio",
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "pinned": pinned,
        "load_before": round(before, 2),
        "load_after": round(os.getloadavg()[0], 2),
    }
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine, "rows": [_as_json(rows, row) for row in rows]}, indent=2))
    print(table(rows))
    print(
        f"\n1 KB bodies, streams of {EVENTS} events, {CONNECTIONS} connections\n"
        f"medians of {args.rounds} rounds of {args.seconds:g} s, in turn\n"
        f"Python {machine['python']}, aiohttp {machine['aiohttp']}, asyncio; {machine['machine']}\n"
        f"{'servers on one core, load on another' if pinned else 'not pinned: no two cores to choose from'}; "
        f"load average {machine['load_before']} before, {machine['load_after']} after"
    )
    return 0


def table(rows: Sequence[Row]) -> str:
    """The medians, the ratios and the aims. `by CPU` says the same of a machine that others use, too."""
    lines = [
        f"{'':14} {'requests/s':>10} {'(min - max)':>17} {'CPU µs':>7} {'load':>5}"
        f"  {'against':14} {'requests/s':>10} {'by CPU':>7} {'aim':>7}"
    ]
    for row in rows:
        case = row.case
        spread = f"({min(row.rate):,.0f} - {max(row.rate):,.0f})"
        line = f"{case.name:14} {median(row.rate):10,.0f} {spread:>17} {median(row.cpu):7.1f} {median(row.load):5.0%}"
        if case.against:
            rate, cpu = ratios(rows, row)
            line += f"  {case.against:14} {rate:10.2f} {cpu:7.2f} {f'>= {case.aim}' if case.aim else '':>7}"
        lines.append(line)
    if max(median(row.load) for row in rows) > 0.9:
        lines.append("load above 90 %: the load generator itself holds a row back; believe the CPU columns there")
    return "\n".join(lines)


def _as_json(rows: Sequence[Row], row: Row) -> dict[str, object]:
    told: dict[str, object] = {
        "name": row.case.name,
        "requests": row.requests,
        "requests_per_second": row.rate,
        "cpu_us_per_request": row.cpu,
        "load_generator_share": row.load,
    }
    if row.case.against:
        rate, cpu = ratios(rows, row)
        told |= {"against": row.case.against, "ratio": rate, "ratio_by_cpu": cpu, "aim": row.case.aim}
    return told


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
