"""Strategies of choosing among ready keys: one file each, one line in the table."""

from __future__ import annotations

from typing import Final

from ..pool import Strategy
from .auto import auto
from .headroom import headroom
from .round_robin import round_robin
from .sticky import sticky
from .weighted import weighted

STRATEGIES: Final[dict[str, Strategy]] = {
    "auto": auto,
    "headroom": headroom,
    "round_robin": round_robin,
    "sticky": sticky,
    "weighted": weighted,
}
