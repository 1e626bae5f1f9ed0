"""Who made which stored object, put into a running proxy and read from it."""

from __future__ import annotations

from proxy.upstream.keys.object_owners import key_made_by
from proxy.upstream.keys.owner_table import Owner
from tests.server.kit import RunningProxy


def remember(server: RunningProxy, id_: str, label: str, client: str = "") -> None:
    """Let the proxy know that the key of this label made an object, for a client without a shared cache."""
    key = server.services.pool.by_label(label)
    assert key is not None
    server.services.object_owners.record([id_], Owner(key.maker, client, f"name {client}" if client else ""))


async def maker(server: RunningProxy, id_: str) -> str:
    """Return the label of the key that made an object; "" if it is not known."""
    owner = (await server.services.object_owners.find([id_])).get(id_)
    key = key_made_by(server.services.pool, owner.maker) if owner is not None else None
    return key.label if key is not None else ""
