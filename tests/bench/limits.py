"""`python -m tests.bench.limits`: how much of a limit is admitted, and how fast, in memory and over Redis.

Several processes ask without a pause through the gate, as the exchange does; what counts are the stamps of what was
admitted (Redis: the server's). Told are the fullest window of 60 s and the mean rate, each over the limit. It judges
nothing but prints.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from typing import Any

from proxy.config.limits import Limits
from proxy.upstream.limits.queue import AdmissionQueue
from proxy.upstream.limits.rate_limiter import ExceedsLimit, RateLimiter, Reservation, Wait
from proxy.upstream.limits.redis import RedisLimits
from proxy.upstream.limits.redis_limiter import RedisReservation
from proxy.upstream.limits.shared import RECHECK
from tests.cache.stores.kit import redis_url

TOKENS = 100
ASKERS = 8


async def admitted(url: str | None, prefix: str, name: str, limit: int, seconds: float) -> list[float]:
    """The stamps (s) of what one process gets in."""
    gate = AdmissionQueue(1000, time.monotonic, recheck=RECHECK if url else float("inf"))
    limits = Limits(rpm=limit, tpm=limit * TOKENS)
    limiter = RedisLimits(url, prefix, name, time.monotonic) if url else None
    if limiter is not None:
        await limiter.open(lambda *_: None)
    allowance = limiter.rate_limiter(("q", "m"), limits, 1.0) if limiter is not None else RateLimiter(limits)
    stamps: list[float] = []
    end = time.monotonic() + seconds

    async def everywhere(now: float) -> Reservation | Wait | ExceedsLimit:
        assert limiter is not None
        while True:
            answer = allowance.reserve(TOKENS, time.monotonic())
            if not isinstance(answer, Reservation) or await limiter.confirm(answer):
                return answer

    async def ask() -> None:
        while time.monotonic() < end:
            attempt: Any = everywhere if limiter is not None else partial(allowance.reserve, TOKENS)
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    reservation = await gate.acquire("m", attempt, 1e9)
            except TimeoutError:
                return
            assert isinstance(reservation, Reservation)
            stamp = reservation.stamp if isinstance(reservation, RedisReservation) else None
            stamps.append(time.monotonic() if stamp is None else stamp / 1000)
            reservation.settle(TOKENS)
            await asyncio.sleep(0)

    await asyncio.gather(*(ask() for _ in range(ASKERS)))
    if limiter is not None:
        assert limiter.sound, "Redis was lost on the way"
        await limiter.close()
    return stamps


async def decisions(url: str | None, seconds: float, askers: int) -> float:
    """Decisions a second of one process."""
    limits = Limits(rpm=10**9, tpm=10**12)
    limiter = RedisLimits(url, f"bench{time.time_ns()}", "one", time.monotonic) if url else None
    if limiter is not None:
        await limiter.open(lambda *_: None)
    allowance = limiter.rate_limiter(("q", "m"), limits, 1.0) if limiter is not None else RateLimiter(limits)
    count, end = 0, time.monotonic() + seconds

    async def ask() -> None:
        nonlocal count
        while time.monotonic() < end:
            reservation = allowance.reserve(TOKENS, time.monotonic())
            assert isinstance(reservation, Reservation)
            if limiter is not None:
                assert await limiter.confirm(reservation)
            reservation.settle(None)
            count += 1

    await asyncio.gather(*(ask() for _ in range(askers)))
    if limiter is not None:
        await limiter.close()
    return count / seconds


def fullest(stamps: Sequence[float], window: float = 60.0) -> int:
    """The most in any window, half open."""
    return max((bisect_left(stamps, stamp + window) - n for n, stamp in enumerate(stamps)), default=0)


async def together(url: str | None, processes: int, limit: int, seconds: float) -> tuple[float, float]:
    """(fullest window, mean rate), each over the limit."""
    prefix = f"bench{time.time_ns()}"
    argv = [sys.executable, "-m", "tests.bench.limits", "--one", prefix, "--limit", str(limit)]
    argv += ["--seconds", str(seconds), *(["--url", url] if url else [])]
    children = [await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE) for _ in range(processes)]
    told = [json.loads((await child.communicate())[0]) for child in children]
    stamps = sorted(stamp for each in told for stamp in each)
    # The mean over whole windows, from burst to burst.
    whole = int((stamps[-1] - stamps[0]) // 60.6) * 60.6
    mean = (bisect_left(stamps, stamps[0] + whole) / whole * 60 / limit) if whole else float("nan")
    return fullest(stamps) / limit, mean


async def everything(processes: int, limit: int, seconds: float) -> None:
    with redis_url() as url:
        for what, address, count in (("memory, 1 process", None, 1), (f"redis, {processes} processes", url, processes)):
            window, mean = await together(address, count, limit, seconds)
            print(f"{what}: fullest 60 s {window:.3f} of the limit, mean rate {mean:.3f}", flush=True)
        for what, address in (("memory", None), ("redis", url)):
            for askers in (1, 32):
                rate = await decisions(address, 3.0, askers)
                print(f"{what}, {askers} at a time: {rate:,.0f} decisions/s", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.limits", description=__doc__)
    parser.add_argument("--seconds", type=float, default=190.0, help="how long they ask (default: 190)")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--limit", type=int, default=3000, help="requests a minute (default: 3,000)")
    parser.add_argument("--one", metavar="PREFIX", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one is not None:
        name = f"{time.time_ns()}-{id(args)}"
        stamps = asyncio.run(admitted(args.url, args.one, name, args.limit, args.seconds))
        print(json.dumps(stamps))
        return 0
    asyncio.run(everything(args.processes, args.limit, args.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
