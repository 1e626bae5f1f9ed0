"""Figures for the pool and the retries: `python -m tests.bench.pool`. Nothing here asserts; the tests do.

- upstream calls for each request while every call fails: 200 requests a second for 60 s in turned time;
- from a key's 401 to the answer by another: real sockets, scripted way up;
- the share of prompt tokens that an upstream has cached, by strategy: conversations over four keys, each with a prompt
  cache of its own (1,024 tokens and more, in steps of 128, gone five minutes after their last use).
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from typing import Any, Final

from proxy.config.limits import Limits
from proxy.config.settings import BreakerSettings, RetrySettings, Settings, ThrottleSettings, TimeoutSettings
from proxy.upstream.keys.lease import KeyRequest, Lease, UpstreamKey
from proxy.upstream.keys.pool import KeyPool
from proxy.upstream.keys.prompt_affinity import prefix_of
from proxy.upstream.keys.selection import STRATEGIES
from tests.pipeline.clock import virtual_time
from tests.pipeline.fixture import PipelineFixture, ask, pool, settings
from tests.pipeline.script import ScriptedTransport, error, says
from tests.server.kit import running_proxy

RATE, SECONDS = 200, 60


def amplification(breaker: BreakerSettings) -> float:
    """Calls made for each request when all of them are answered with 503."""
    figures: list[float] = []

    @virtual_time
    async def outage() -> None:
        config: Settings = settings(
            retry=RetrySettings(), breaker=breaker, throttle=ThrottleSettings(), timeouts=TimeoutSettings()
        )
        scene = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: error(503)), config=config)
        asked = []
        for number in range(RATE * SECONDS):
            asked.append(scene.loop.create_task(scene.ask(ask(str(number)))))
            await asyncio.sleep(1 / RATE)
        for task in asked:
            await task
        figures.append(len(scene.transport.sent) / len(asked))

    outage()
    return figures[0]


async def takeover(times: int = 200) -> tuple[float, float]:
    """(median, 99th percentile) in ms of a request whose first key is refused, less that of one whose is not."""
    spent: dict[bool, list[float]] = {False: [], True: []}
    for number in range(times):
        for refused in (False, True):
            moves = [error(401), says()] if refused else [says()]
            async with running_proxy(*moves, config=settings(pool("k1", "k2"))) as home:
                began = time.perf_counter()
                answer = await home.ask(body=ask(str(number)))
                spent[refused].append((time.perf_counter() - began) * 1000)
                assert (answer.status, len(home.transport.sent)) == (200, 1 + refused)
    base = statistics.median(spent[False])
    slow = sorted(spent[True])
    return statistics.median(slow) - base, slow[int(len(slow) * 0.99)] - base


STEP: Final = 128
LEAST: Final = 1024
KEPT: Final = 300.0


class PromptCache:
    """One account's upstream: prefixes of whole steps, for some minutes after their last use."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], float] = {}

    def serve(self, conversation: int, tokens: int, now: float) -> int:
        """Tokens found; all of the prompt is kept for the next."""
        found = 0
        for end in range(LEAST, tokens + 1, STEP):
            stamp = self._seen.get((conversation, end))
            if stamp is not None and now - stamp < KEPT:
                found = end
            self._seen[conversation, end] = now
        return found


def cached_share(strategy: str, limits: dict[str, Limits], seed: int = 7) -> float:
    """Of all prompt tokens of 200 conversations of 12 turns, 30 at a time."""
    dice = random.Random(seed)
    keys = [UpstreamKey(f"k{number}", 0, ("*",)) for number in range(4)]
    ring = KeyPool(keys, STRATEGIES[strategy], limits)
    caches = {key.label: PromptCache() for key in keys}
    talks: dict[int, dict[str, Any]] = {}
    begun = total = cached = 0
    now = 0.0
    while begun < 200 or talks:
        while begun < 200 and len(talks) < 30:
            opening = f"{begun} " + "You are a support agent. " * dice.randrange(200, 500)
            talks[begun] = {"messages": [{"role": "system", "content": opening}], "turns": 0}
            begun += 1
        number = dice.choice(list(talks))
        talk = talks[number]
        talk["messages"].append({"role": "user", "content": "x" * dice.randrange(100, 2000)})
        tokens = sum(len(message["content"]) for message in talk["messages"]) // 4
        wish = KeyRequest(prefix_of("chat", talk, "gpt-4o"))
        lease = ring.lease("gpt-4o", tokens, frozenset(), now, request=wish)
        while not isinstance(lease, Lease):
            now += 1.0
            lease = ring.lease("gpt-4o", tokens, frozenset(), now, request=wish)
        if lease.reservation is not None:
            lease.reservation.settle(tokens)
        total += tokens
        cached += caches[lease.key.label].serve(number, tokens, now)
        talk["turns"] += 1
        if talk["turns"] == 12:
            del talks[number]
        now += dice.expovariate(1.0)
    return cached / total


def main() -> None:
    for name, breaker in (
        ("breaker off", BreakerSettings(failures=10**6)),
        ("breaker as by default", BreakerSettings()),
    ):
        print(f"calls a request while every call fails, {name}: {amplification(breaker):.3f}")
    median, late = asyncio.run(takeover())
    print(f"from a key's 401 to the answer by another: median {median:.2f} ms, p99 {late:.2f} ms")
    for name, limits in (("without limits", {}), ("150,000 tokens a minute a key", {"*": Limits(tpm=150_000)})):
        shares = {strategy: cached_share(strategy, limits) for strategy in STRATEGIES}
        print(f"cached share of prompt tokens, {name}: {', '.join(f'{k} {v:.0%}' for k, v in shares.items())}")


if __name__ == "__main__":
    main()
