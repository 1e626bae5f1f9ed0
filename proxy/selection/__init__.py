"""Key strategies: one file each, one line in the table. `auto` is headroom until prompt affinity is built."""

from __future__ import annotations

from typing import Final

from ..core.keyring import Strategy
from .headroom import headroom
from .round_robin import round_robin

STRATEGIES: Final[dict[str, Strategy]] = {"auto": headroom, "headroom": headroom, "round_robin": round_robin}
