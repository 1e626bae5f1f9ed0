"""The ledger's SQLite file: one row for each request in `rows_v1`, and what requests share in `kinds_v1`.

A row's key is its time and a number that only its process gives, so that writing it again changes nothing.
"""

from __future__ import annotations

import sqlite3
from typing import Final

import msgspec

from ...system import sqlite as files
from .records import LedgerRecord, RecordKind

ROWS: Final = "rows_v1"
KINDS: Final = "kinds_v1"

LAYOUT: Final = files.Layout(
    application_id=0x4F43506C,  # "OCPl"
    schema=f"""
CREATE TABLE IF NOT EXISTS {KINDS} (
  id INTEGER PRIMARY KEY,    -- records.kind_id()
  client TEXT NOT NULL, endpoint TEXT NOT NULL, model TEXT NOT NULL, answer_model TEXT NOT NULL,
  status INTEGER NOT NULL, error TEXT NOT NULL, cache TEXT NOT NULL, stream INTEGER NOT NULL,
  upstream TEXT NOT NULL, key TEXT NOT NULL, cost_status TEXT NOT NULL, sampled INTEGER NOT NULL,
  tags TEXT NOT NULL,        -- a JSON array
  run TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS {ROWS} (
  time INTEGER NOT NULL,     -- Unix milliseconds
  place INTEGER NOT NULL,    -- within a process; the first is random
  kind INTEGER NOT NULL,
  requests INTEGER NOT NULL, -- hits of one entry within a moment are one row
  attempts INTEGER NOT NULL,
  prompt INTEGER NOT NULL, cached INTEGER NOT NULL, completion INTEGER NOT NULL, total INTEGER NOT NULL,  -- tokens
  other TEXT,                -- tokens and calls of rarer kinds, as JSON
  cost INTEGER, saved INTEGER,  -- 1e-12 USD; NULL: unknown
  rest TEXT,                 -- what these two leave out: `cost saved` in USD
  queue INTEGER NOT NULL, upstream INTEGER NOT NULL, duration INTEGER NOT NULL, first INTEGER NOT NULL,  -- microseconds
  digest INTEGER,            -- the first 60 bits of the cache key
  PRIMARY KEY (time, place)
) WITHOUT ROWID;
""",
    names=frozenset({ROWS, KINDS}),
)

PUT_KIND: Final = f"INSERT OR IGNORE INTO {KINDS} VALUES ({', '.join('?' * (1 + len(RecordKind._fields)))})"
PUT_ROW: Final = (
    f"INSERT OR IGNORE INTO {ROWS} (time, place, {', '.join(LedgerRecord._fields[1:])}) "
    f"VALUES ({', '.join('?' * (1 + len(LedgerRecord._fields)))})"
)


def is_ours(connection: sqlite3.Connection) -> bool:
    found: int = connection.execute("PRAGMA application_id").fetchone()[0]
    return found == LAYOUT.application_id


def kind_row(number: int, kind: RecordKind) -> tuple[object, ...]:
    return number, *kind[:-2], msgspec.json.encode(kind.tags).decode(), kind.run


def kinds(connection: sqlite3.Connection) -> dict[int, RecordKind]:
    """Return every kind by its number."""
    found = {}
    for number, *fields in connection.execute(f"SELECT id, {', '.join(RecordKind._fields)} FROM {KINDS}"):
        kind = RecordKind._make(fields)
        tags = tuple(msgspec.json.decode(fields[-2]))
        found[number] = kind._replace(stream=bool(kind.stream), sampled=bool(kind.sampled), tags=tags)
    return found
