"""The key and the client that made each stored object, in one process and in common with others."""

from __future__ import annotations

import asyncio

import pytest

from proxy.protocol.errors import ProxyError
from proxy.protocol.request import Client
from proxy.upstream.keys.fixed_key import first_usable
from proxy.upstream.keys.lease import UpstreamKey
from proxy.upstream.keys.object_owners import ObjectOwners, Pinned
from proxy.upstream.keys.owner_table import Owner, maker_of
from proxy.upstream.keys.pool import KeyPool
from proxy.upstream.keys.selection import STRATEGIES
from proxy.upstream.keys.stored_objects import BroughtObjects, NamedObjects

ANNA, BEN = Client("anna", "name anna"), Client("ben", "name ben")
ONE, TWO = "https://one.test/v1", "https://two.test/v1"


class Place:
    """What two processes have in common."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        self.asked = 0

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def put(self, digests: list[str], owner: str, only_new: bool) -> None:
        for digest in digests:
            if not only_new or digest not in self.known:
                self.known[digest] = owner

    async def get(self, digests: list[str]) -> dict[str, str]:
        self.asked += 1
        return {digest: self.known[digest] for digest in digests if digest in self.known}


def owner(label: str, client: Client | None = None) -> Owner:
    maker = pool().by_label(label)
    assert maker is not None
    return Owner(maker.maker) if client is None else Owner(maker.maker, client.name, client.cache_partition)


def pool(*labels: str) -> KeyPool:
    """A pool of these keys: `a1` and `a2` at one upstream, `b1` at another."""
    addresses = {"a": ONE, "b": TWO}
    keys = [UpstreamKey(x, 0, ("*",), maker=maker_of(addresses[x[0]], f"sk-{x}")) for x in labels or ("a1", "a2", "b1")]
    return KeyPool(keys, STRATEGIES["auto"], {})


async def pin(owners: ObjectOwners, *ids: str, client: Client = ANNA, keys: KeyPool | None = None) -> str:
    keys = keys or pool()
    return (await owners.pin(keys, NamedObjects(ids), client, lambda: first_usable(keys, keys.keys, "m", 0.0))).key


async def test_a_process_remembers_the_owner_of_an_object() -> None:
    owners = ObjectOwners(lambda: 0.0)
    await owners.open()
    owners.record(["file-1"], owner("a2", ANNA))
    assert await owners.find(["x", "file-1"]) == {"file-1": owner("a2", ANNA)}
    assert await owners.find([]) == {}
    await owners.close()


async def test_processes_share_owners() -> None:
    place = Place()
    one, other = ObjectOwners(lambda: 0.0, [place]), ObjectOwners(lambda: 0.0, [place])
    one.record(["file-1"], owner("a2"))
    await asyncio.sleep(0)
    assert await pin(other, "file-1") == await pin(other, "file-1") == await pin(one, "file-1") == "a2"
    assert place.asked == 1  # afterwards it is known here
    place.known.clear()
    one.record(["file-1"], owner("a2"))
    await asyncio.sleep(0)
    assert place.known == {}  # no news


async def test_an_object_that_is_used_is_remembered_for_longer() -> None:
    now, place = [0.0], Place()
    owners = ObjectOwners(lambda: now[0], [place])
    owners.record(["conv_1"], owner("a2"))
    for day in range(1, 60):
        now[0] = day * 86_400.0
        assert await pin(owners, "conv_1") == "a2"
    await asyncio.sleep(0)
    assert place.known
    now[0] += 31 * 86_400.0
    place.known.clear()
    assert await pin(owners, "conv_1") == "a1"


async def test_a_place_that_knows_more_is_not_overruled_by_what_is_only_seen() -> None:
    place = Place()
    one, other = ObjectOwners(lambda: 0.0, [place]), ObjectOwners(lambda: 0.0, [place])
    one.record(["file-1"], owner("a2", ANNA))
    await asyncio.sleep(0)
    other.record(["file-1", "file-2"], owner("a2"), only_new=True)  # they were in a list
    for _ in range(5):
        await asyncio.sleep(0)
    assert await one.find(["file-1", "file-2"]) == {"file-1": owner("a2", ANNA), "file-2": owner("a2")}
    with pytest.raises(ProxyError, match="file-1"):
        await pin(other, "file-1", client=BEN)


# --- which key --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (("a1", "a2", "b1"), "b1"),
        (("b1", "a2", "a1"), "b1"),  # the order of the list means nothing
        (("a1", "a2"), "a1"),  # the key is gone, and its upstream: the fixed one
    ],
)
async def test_the_maker_is_found_in_any_order(keys: tuple[str, ...], expected: str) -> None:
    owners = ObjectOwners(lambda: 0.0)
    owners.record(["resp_1"], owner("b1"))
    assert await pin(owners, "resp_1", keys=pool(*keys)) == expected


async def test_a_key_that_is_gone_is_replaced_by_one_of_its_upstream() -> None:
    owners = ObjectOwners(lambda: 0.0)
    owners.record(["resp_1"], owner("a1"))
    assert await pin(owners, "resp_1", keys=pool("b1", "a2")) == "a2"


async def test_the_first_known_object_decides() -> None:
    owners = ObjectOwners(lambda: 0.0)
    owners.record(["file-1"], owner("a2"))
    owners.record(["resp_1"], owner("b1"))
    assert await pin(owners, "x", "resp_1", "file-1") == "b1"
    assert await pin(owners, "x") == "a1"
    assert await pin(owners) == ""


async def test_a_text_that_may_be_an_id_decides_only_if_it_is_known() -> None:
    owners, keys = ObjectOwners(lambda: 0.0), pool()
    owners.record(["7f"], owner("b1"))
    for text, key in (("7f", "b1"), ("8f", "")):
        named = NamedObjects(possible=(text,))
        assert (await owners.pin(keys, named, ANNA, lambda: first_usable(keys, keys.keys, "m", 0.0))).key == key


# --- whose ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made_by", "asked_by", "allowed"),
    [
        (ANNA, ANNA, True),
        (ANNA, BEN, False),
        (Client("anna", "namespace x"), Client("ben", "namespace x"), True),
        (Client("anna", "namespace x"), ANNA, True),  # she has left the namespace
        (ANNA, Client("ben"), True),  # now the cache is shared
        (Client("anna"), BEN, False),  # now it is not
        (Client(), BEN, True),
        (ANNA, Client(), True),
        (Client("", "credential 1"), Client("", "credential 2"), True),  # the upstream decides
        (None, BEN, True),
    ],
)
async def test_who_may_use_an_object(made_by: Client | None, asked_by: Client, allowed: bool) -> None:
    owners = ObjectOwners(lambda: 0.0)
    owners.record(["file-1"], owner("b1", made_by))
    if allowed:
        assert await pin(owners, "file-1", client=asked_by) == "b1"
    else:
        with pytest.raises(ProxyError) as raised:
            await pin(owners, "x", "file-1", client=asked_by)
        assert (raised.value.code, raised.value.status) == ("object_not_found", 404)


async def test_what_two_clients_get_as_made_for_them_belongs_to_neither() -> None:
    """As from an upstream with a cache of its own."""
    owners = ObjectOwners(lambda: 0.0)
    owners.record(["resp_1"], owner("a2", ANNA))
    owners.record(["resp_1"], owner("a2", BEN))
    assert [await pin(owners, "resp_1", client=client) for client in (ANNA, BEN)] == ["a2", "a2"]


def brought(*made: str, seen: tuple[str, ...] = ()) -> BroughtObjects:
    return BroughtObjects(made, seen, ("sealed 1",))


async def test_whose_objects_a_response_brings() -> None:
    keys = pool()
    key = keys.by_label("a2")
    assert key is not None
    owners = ObjectOwners(lambda: 0.0)
    named = NamedObjects(("file-0",))
    owners.record_brought(key, Pinned("", None, named), ANNA, brought("resp_1", "file-0", seen=("file-9",)))
    of_anna, of_nobody = owner("a2", ANNA), owner("a2")
    assert await owners.find(["resp_1", "file-0", "file-9", "sealed 1"]) == {
        "sealed 1": of_nobody,
        "resp_1": of_anna,
        "file-0": of_nobody,
        "file-9": of_nobody,
    }
    owners.record_brought(key, Pinned("", of_anna, named), None, brought("file-8"))  # read with what is anna's
    owners.record_brought(key, Pinned(), None, brought("file-7", "resp_1"))  # a list
    assert await owners.find(["file-8", "file-7", "resp_1"]) == {
        "file-8": of_anna,
        "file-7": of_nobody,
        "resp_1": of_anna,
    }
