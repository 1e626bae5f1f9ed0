"""Read reports from the ledger's file while other processes write to it. It blocks: use it in commands and threads."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from ...system import sqlite as files
from .file import KINDS, ROWS, is_ours, kinds
from .records import dollars
from .reporting import DAY, SLOT, Label, ReportRow, WhatIf, labels, ordered, replay

BUSY: Final = 5.0
_LATEST: Final = 2**62

_MONEY: Final = 1_000_000
"""Amounts are added up in two parts, so that neither sum comes near 64 bits."""


class LedgerMissing(Exception):
    """There is nothing to read; the message says why, in one line."""


@dataclass(frozen=True, slots=True)
class Span:
    """From `since` to before `until`: Unix seconds; None for no bound."""

    since: float | None = None
    until: float | None = None

    @property
    def bounds(self) -> tuple[int, int]:
        low = -_LATEST if self.since is None else int(self.since * 1000)
        return low, _LATEST if self.until is None else int(self.until * 1000)


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the file read-only. Raises LedgerMissing."""
    if not path.is_file():
        raise LedgerMissing(f"there is no ledger {path}: no proxy has written one yet, or ledger.enabled is false")
    try:
        connection = files.open_to_read(path, BUSY)
        try:
            if connection.execute("PRAGMA page_count").fetchone() == (0,):
                raise LedgerMissing(f"the ledger {path} is still empty")
            if not is_ours(connection):
                raise LedgerMissing(f"{path} is not a ledger")
            yield connection
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise LedgerMissing(f"{path} cannot be read: {error}") from None


def report(path: Path, by: Sequence[str], span: Span) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return (a row for each group, the total). Raises LedgerMissing."""
    groups: dict[Label, ReportRow] = {}
    total = ReportRow()
    day = f"time / {DAY}" if {"day", "month"} & set(by) else "0"
    where = f"FROM {ROWS} WHERE time >= ? AND time < ?"
    with opened(path) as connection:
        connection.execute("BEGIN")
        known = kinds(connection)
        places: dict[tuple[int, int], list[ReportRow]] = {}

        def sums_of(number: int, day: int) -> list[ReportRow]:
            found = places.get((number, day))
            if found is None:
                found = [groups.setdefault(label, ReportRow()) for label in labels(by, known[number], day)]
                found.append(total)
                places[number, day] = found
            return found

        rests = 0
        for number, at, count, unpriced, *tokens, cost, cost_low, saved, saved_low, rest in connection.execute(
            f"SELECT kind, {day}, sum(requests), sum(CASE WHEN cost IS NULL THEN requests ELSE 0 END), sum(attempts), "
            f"sum(prompt), sum(cached), sum(completion), sum(total), sum(cost / {_MONEY}), sum(cost % {_MONEY}), "
            f"sum(saved / {_MONEY}), sum(saved % {_MONEY}), count(rest) {where} GROUP BY 1, 2",
            span.bounds,
        ):
            kind = known[number]
            paid, spared = (cost or 0) * _MONEY + (cost_low or 0), (saved or 0) * _MONEY + (saved_low or 0)
            rests += rest
            for sums in sums_of(number, at):
                sums.count(kind.cache, kind.status, kind.error, count, unpriced)
                sums.tokens(kind.cache, *tokens)
                sums.cost += paid
                sums.saved += spared
        if rests:
            for number, at, rest in connection.execute(
                f"SELECT kind, {day}, rest {where} AND rest IS NOT NULL", span.bounds
            ):
                for sums in sums_of(number, at):
                    sums.add_rest(rest)
        times: defaultdict[tuple[int, int], tuple[defaultdict[int, int], defaultdict[int, int]]]
        times = defaultdict(lambda: (defaultdict(int), defaultdict(int)))  # quicker than Counter in this loop
        for number, at, count, slot, first in connection.execute(
            f"SELECT kind, {day}, requests, duration / {SLOT}, first / {SLOT} {where}", span.bounds
        ):
            latency, firsts = times[number, at]
            latency[slot] += count
            firsts[first] += count
        for place, (latency, firsts) in times.items():
            for sums in places[place]:
                sums.latency.update(latency)
                sums.first.update(firsts)
    return ordered(by, groups), total.as_json()


def what_if(path: Path, span: Span, what: WhatIf) -> dict[str, Any]:
    """Return what another cache would have done in this time. Raises LedgerMissing."""
    with opened(path) as connection:
        connection.execute("BEGIN")
        rows = connection.execute(
            f"SELECT time, kind, requests, ifnull(cost, 0), ifnull(saved, 0), digest FROM {ROWS} "
            "WHERE time >= ? AND time < ? AND digest IS NOT NULL ORDER BY time, place",
            span.bounds,
        )
        return replay(rows, kinds(connection), what)


def spent(path: Path, since: float, client: str | None = None) -> Decimal:
    """Return the USD spent since a time (Unix seconds) by one client or by all; 0 if there is no ledger."""
    whose = f"AND kind IN (SELECT id FROM {KINDS} WHERE client = ?)" if client is not None else ""
    bounds = (int(since * 1000), *([client] if client is not None else []))
    where = f"FROM {ROWS} WHERE time >= ? {whose}"
    try:
        with opened(path) as connection:
            high, low = connection.execute(
                f"SELECT sum(cost / {_MONEY}), sum(cost % {_MONEY}) {where}", bounds
            ).fetchone()
            total = dollars((high or 0) * _MONEY + (low or 0))
            for (rest,) in connection.execute(f"SELECT rest {where} AND rest IS NOT NULL", bounds):
                total = dollars(0, total, Decimal(rest.split()[0]))
            return total
    except LedgerMissing:
        return Decimal(0)
