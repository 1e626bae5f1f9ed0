"""Keys in proportion to `weight`, evenly interleaved: nginx's smooth weighted round robin.

See ngx_http_upstream_round_robin.c. A key of weight 0 is used only if no other is ready.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..lease import UpstreamKey
from ..pool import KeyPool


def weighted(
    keys: Sequence[UpstreamKey], pool: KeyPool, model: str, now: float, prefix: bytes = b""
) -> list[UpstreamKey]:
    if len(pool.credit) >= 4096:
        pool.credit.clear()
    credit = pool.credit.setdefault(model, {})
    for key in keys:
        credit[key.label] = credit.get(key.label, 0.0) + key.weight
    order = sorted(keys, key=lambda key: (key.weight > 0, credit[key.label]), reverse=True)
    credit[order[0].label] -= sum(key.weight for key in keys)
    return order
