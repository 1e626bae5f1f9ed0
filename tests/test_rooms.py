"""A plain miss walks through few rooms of the package, and back and forth only so often."""

from __future__ import annotations

import pytest

from tests.rooms import KINDS, walks

MAX_ROOMS = 12
MAX_CHANGES = 100

pytestmark = pytest.mark.slow


async def test_plain_miss_enters_few_rooms() -> None:
    walk = (await walks(["plain miss"]))["plain miss"]
    assert {"server", "pipeline", "upstream", "cache"} <= set(walk.rooms)
    assert walk.entered <= MAX_ROOMS, set(walk.rooms)
    assert walk.changes <= MAX_CHANGES, walk.rooms


async def test_every_kind_of_request_can_be_measured() -> None:
    found = await walks()
    assert list(found) == list(KINDS)
    assert all(walk.changes >= walk.entered - 1 > 0 for walk in found.values())
    assert found["memory hit, same bytes"].changes < found["plain miss"].changes < found["streamed miss"].changes
