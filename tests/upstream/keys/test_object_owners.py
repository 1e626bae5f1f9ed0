"""The maker of each stored object, in one process and shared with other proxies."""

from __future__ import annotations

import asyncio

from proxy.upstream.keys.object_owners import ObjectOwners


class Board:
    """Where two proxies tell each other."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        self.asked = 0

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def put(self, ids: list[str], label: str) -> None:
        self.known |= dict.fromkeys(ids, label)

    async def get(self, ids: list[str]) -> str | None:
        self.asked += 1
        return next((self.known[id_] for id_ in ids if id_ in self.known), None)


async def test_a_process_remembers_the_owner_of_an_object() -> None:
    objects = ObjectOwners(lambda: 0.0)
    await objects.open()
    objects.record_owner(["file-1"], "k1")
    assert await objects.owner_of(["x", "file-1"]) == "k1"
    assert await objects.owner_of(["x"]) is None
    assert await objects.owner_of([]) is None
    await objects.close()


async def test_processes_share_owners_over_redis() -> None:
    board = Board()
    one, other = ObjectOwners(lambda: 0.0, board), ObjectOwners(lambda: 0.0, board)
    one.record_owner(["file-1"], "k1")
    await asyncio.sleep(0)
    assert await other.owner_of(["file-1"]) == "k1"
    assert await other.owner_of(["file-1"]) == "k1"
    assert await one.owner_of(["file-1"]) == "k1"
    assert board.asked == 1  # afterwards it is known here
    board.known.clear()
    one.record_owner(["file-1"], "k1")
    await asyncio.sleep(0)
    assert board.known == {}  # no news
