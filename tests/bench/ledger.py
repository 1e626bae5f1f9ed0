"""What the ledger costs: `python -m tests.bench.ledger [ROWS]`. µs a record, bytes a row, seconds for a report."""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from proxy.accounting.ledger.ledger import Ledger
from proxy.accounting.ledger.reader import Span, report, spent, what_if
from proxy.accounting.ledger.reporting import ReportRow, WhatIf
from proxy.accounting.ledger.writer import LedgerWriter
from proxy.accounting.receipt import Receipt
from proxy.cache.entry import Entry
from proxy.cost.usage import Usage
from proxy.system.clock import SYSTEM_CLOCK

MODELS = ("gpt-4o", "gpt-4o-mini", "o3", "text-embedding-3-small")


def receipt(chance: random.Random, wall: float) -> Receipt:
    usage = Usage(chance.randrange(3000), chance.randrange(1000), chance.randrange(4000))
    spent_ms = chance.lognormvariate(7, 1)
    return Receipt(
        id="",
        client=chance.choice(("anna", "ben")),
        endpoint="chat",
        model=chance.choice(MODELS),
        status=200,
        cache="miss",
        finished_at=wall,
        answer_model="gpt-4o-2024-08-06",
        stream=chance.random() < 0.5,
        upstream="openai",
        key=f"openai-{chance.randrange(4)}",
        attempts=1,
        cost_usd=f"0.{chance.randrange(10**8):010}",
        saved_usd="0.000000",
        cost_status="exact",
        usage=usage,
        upstream_ms=spent_ms,
        total_ms=spent_ms + 1,
        first_byte_ms=spent_ms / 2,
        tags=(f"team:{chance.randrange(5)}",),
        run=f"run-{chance.randrange(10)}",
        cache_key=f"{chance.getrandbits(60):015x}",
    )


def entries(count: int) -> list[Entry]:
    usage = Usage(100, 20, 120)
    return [
        Entry(
            f"{n:064x}", "json", 200, (), b"", None, 0.0, 60.0, "chat", "gpt-4o", None, usage, "0.002250", "", (), True
        )
        for n in range(count)
    ]


def timed(what: Callable[[], object]) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def main(count: int) -> None:
    chance = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "usage.db"
        ledger = Ledger(str(path.with_name("other.db")), SYSTEM_CLOCK)
        hits, some = 200_000, entries(1000)

        def serve(of: list[Entry], times: int = hits) -> None:
            for number in range(times):
                ledger.hit(of[number % len(of)], "anna", (), "", 1.0, 0.2)

        def miss(batch: list[Receipt]) -> None:
            for one in batch:
                ledger.record(one)

        serve(some[:1])
        print(f"hit, one question: {timed(partial(serve, some[:1])) / hits * 1e6:.2f} µs")
        print(f"hit, 1,000 questions in turn: {timed(partial(serve, some)) / hits * 1e6:.2f} µs")
        ledger.flush()
        first = entries(40_000)
        print(f"hit, a question's first: {timed(partial(serve, first, len(first))) / len(first) * 1e6:.2f} µs")
        batch = [receipt(chance, 1.8e9) for _ in range(40_000)]
        print(f"miss, on the loop: {timed(partial(miss, batch)) / len(batch) * 1e6:.2f} µs")

        writer = LedgerWriter(path, 1, ReportRow())
        writer.start()
        wall, seconds = 1.7e9, 0.0
        for start in range(0, count, 20_000):
            batch = [receipt(chance, wall + number * 2.5) for number in range(start, min(start + 20_000, count))]
            done = threading.Event()

            def write(batch: list[Receipt] = batch, done: threading.Event = done) -> None:
                writer.put([(one, 1) for one in batch], (), done=done)
                done.wait()

            seconds += timed(write)
        writer.close(10)
        print(f"miss, in the thread: {seconds / count * 1e6:.2f} µs")
        print(f"bytes a row: {path.stat().st_size / count:.0f}")
        tenth = wall + count * 2.25
        for by in (["day"], ["model"], ["tag"], ["day", "model"]):
            seconds = timed(partial(report, path, by, Span()))
            print(f"report by {' and '.join(by)}, {count:,} rows: {seconds:.2f} s")
        print(f"report of the last tenth: {timed(partial(report, path, ['day'], Span(tenth))):.2f} s")
        print(f"what if: {timed(partial(what_if, path, Span(), WhatIf(604800.0))):.2f} s")
        print(f"spent in the last tenth: {timed(partial(spent, path, tenth, 'anna')):.3f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
