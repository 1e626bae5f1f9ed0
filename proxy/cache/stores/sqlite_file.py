"""The cache's SQLite file: one row for each stored response, and the last purges."""

from __future__ import annotations

import re
from typing import Final

from ...system.sqlite import Layout

TABLE: Final = "entries_v2"
"""The name contains the schema's version, so that another version of the program reads nothing of this table."""

PURGES: Final = "purges_v1"
"""The last purges, as `interface.purge_text` writes them; the numbers only grow."""

LAYOUT: Final = Layout(
    application_id=0x4F435063,  # "OCPc"
    schema=f"""
CREATE TABLE IF NOT EXISTS {TABLE} (
  key TEXT NOT NULL, form TEXT NOT NULL,
  endpoint TEXT NOT NULL, model TEXT NOT NULL, namespace TEXT NOT NULL,
  tags TEXT NOT NULL,        -- tag_text() of each
  stored_at REAL NOT NULL,   -- Unix seconds
  ends_at REAL NOT NULL,     -- stored_at and the ttl
  used REAL NOT NULL,        -- Unix seconds
  size INTEGER NOT NULL,     -- bytes of head and body
  head BLOB NOT NULL, body BLOB NOT NULL,  -- cache/codec.py
  bare TEXT NOT NULL,        -- cache/entry.py; '' if it is the key
  UNIQUE (key, form)
);
CREATE INDEX IF NOT EXISTS {TABLE}_used ON {TABLE} (used, size);
CREATE INDEX IF NOT EXISTS {TABLE}_ends ON {TABLE} (ends_at);
CREATE INDEX IF NOT EXISTS {TABLE}_bare ON {TABLE} (bare) WHERE bare != '';
CREATE TABLE IF NOT EXISTS {PURGES} (number INTEGER PRIMARY KEY AUTOINCREMENT, which TEXT NOT NULL);
""",
    names=frozenset({TABLE, f"{TABLE}_used", f"{TABLE}_ends", f"{TABLE}_bare", PURGES}),
)


_ESCAPED: Final = re.compile(r"\\(n|\\)")


def tag_text(tag: str) -> str:
    """Return a tag as it stands in the column `tags`: between line feeds, with none inside."""
    return "\n" + tag.replace("\\", "\\\\").replace("\n", "\\n") + "\n"


def tags_of(text: str) -> list[str]:
    """Return the tags of a column `tags`."""
    escaped = text[1:-1].split("\n\n") if len(text) > 1 else []
    return [_ESCAPED.sub(lambda found: "\n" if found[1] == "n" else "\\", tag) for tag in escaped]
