"""`openai-proxy cache stats`: how much is stored, of what, and what a hit on each saves together."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from .interface import EntrySummary
from .local import CacheCommand
from .text import ProgressLine, cut, say, size, table

_RIGHT = ("ENTRIES", "SIZE", "OVER", "SAVES USD")
_SIZES = frozenset({"bytes", "file_bytes", "max_bytes", "memory_bytes", "memory_max_bytes"})


@dataclass(slots=True)
class _GroupTotal:
    entries: int = 0
    size: int = 0
    over: int = 0
    saves: Decimal = Decimal(0)

    def add(self, card: EntrySummary) -> None:
        self.entries += 1
        self.size += card["size"]
        self.over += card["ttl_left_s"] < 0
        self.saves += Decimal(card["saves_usd"] or 0)

    def as_json(self) -> dict[str, Any]:
        return {"entries": self.entries, "size": self.size, "over": self.over, "saves_usd": f"{self.saves:f}"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


async def run(args: argparse.Namespace, session: CacheCommand) -> int:
    """0. `saves`: one hit on each entry; `over`: their lifetime has ended."""
    sums: dict[tuple[str, str], _GroupTotal] = {}
    async with session.client() as cabinet:
        facts = await cabinet.facts()
        with ProgressLine("counting", int(facts.get("entries", 0))) as progress:
            async for page in cabinet.list({}):
                for card in page:
                    sums.setdefault((card["endpoint"], card["model"]), _GroupTotal()).add(card)
                progress.step(len(page))
    ordered = sorted(sums.items(), key=lambda item: (-item[1].size, item[0]))
    rows = [
        (name, cut(model, 24), f"{one.entries:,}", size(one.size), f"{one.over:,}", f"{one.saves:.4f}")
        for (name, model), one in ordered
    ]
    lines = [f"{name}: {size(value) if name in _SIZES else value}" for name, value in facts.items()]
    if rows:
        lines += ["", *table(("ENDPOINT", "MODEL", "ENTRIES", "SIZE", "OVER", "SAVES USD"), rows, _RIGHT)]
    models = [{"endpoint": name, "model": model, **one.as_json()} for (name, model), one in ordered]
    say(args, facts | {"models": models}, lines)
    return 0
