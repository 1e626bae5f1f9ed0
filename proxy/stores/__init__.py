"""Cache backends, one file each.

`memory` is the tier in front of every backend: synchronous, private to the process. A backend behind it
(sqlite, redis) is one file here and one line in this table; its module is imported only when its name is
configured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

BACKENDS: Final[Mapping[str, str | None]] = {
    "memory": None,
}
"""`cache.backend` -> the module of the tier behind memory, None where nothing stands behind it."""
