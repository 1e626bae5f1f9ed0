"""`openai-proxy cache stats`: number, size and possible savings of the stored responses, by model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from .interface import EntrySummary
from .local import CacheCommand
from .text import ProgressLine, cut, print_result, size, table

_RIGHT = ("ENTRIES", "SIZE", "OVER", "SAVES USD")
_SIZES = frozenset({"bytes", "file_bytes", "max_bytes", "memory_bytes", "memory_max_bytes"})


@dataclass(slots=True)
class _GroupTotal:
    """Totals of one model. over: expired entries; saves: USD, with one hit on each entry."""

    entries: int = 0
    size: int = 0
    over: int = 0
    saves: Decimal = Decimal(0)

    def add(self, entry: EntrySummary) -> None:
        self.entries += 1
        self.size += entry["size"]
        self.over += entry["ttl_left_s"] < 0
        self.saves += Decimal(entry["saves_usd"] or 0)

    def as_json(self) -> dict[str, Any]:
        return {"entries": self.entries, "size": self.size, "over": self.over, "saves_usd": f"{self.saves:f}"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: this subcommand has no arguments of its own."""


async def run(args: argparse.Namespace, command: CacheCommand) -> int:
    """Print the totals."""
    totals: dict[tuple[str, str], _GroupTotal] = {}
    async with command.client() as cache:
        facts = await cache.facts()
        with ProgressLine("counting", int(facts.get("entries", 0))) as progress:
            async for page in cache.list({}):
                for entry in page:
                    totals.setdefault((entry["endpoint"], entry["model"]), _GroupTotal()).add(entry)
                progress.step(len(page))
    ordered = sorted(totals.items(), key=lambda item: (-item[1].size, item[0]))
    rows = [
        (name, cut(model, 24), f"{total.entries:,}", size(total.size), f"{total.over:,}", f"{total.saves:.4f}")
        for (name, model), total in ordered
    ]
    lines = [f"{name}: {size(value) if name in _SIZES else value}" for name, value in facts.items()]
    if rows:
        lines += ["", *table(("ENDPOINT", "MODEL", "ENTRIES", "SIZE", "OVER", "SAVES USD"), rows, _RIGHT)]
    models = [{"endpoint": name, "model": model, **total.as_json()} for (name, model), total in ordered]
    print_result(args, facts | {"models": models}, lines)
    return 0
