"""Who made each stored object, as one process or the supervisor of several keeps it in memory."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Final, NamedTuple

KEPT_FOR: Final = 30 * 86_400.0
"""Seconds for which the owner of an object is remembered; OpenAI keeps responses for 30 days."""

MAX_OBJECTS: Final = 100_000
"""Objects that are remembered in memory."""

TELL_AGAIN: Final = 86_400.0
"""Seconds after which an owner is stored and shared again, so that what is used is not forgotten."""


class Owner(NamedTuple):
    """maker: of the key, see `maker_of`. client, partition: of the client that has it; both "": any client."""

    maker: str
    client: str = ""
    partition: str = ""

    @classmethod
    def from_text(cls, text: str) -> Owner:
        maker, _, rest = text.partition("\n")
        client, _, partition = rest.partition("\n")
        return cls(maker, client, partition)

    def text(self) -> str:
        return "\n".join(self)


def maker_of(base_url: str, *credential: str) -> str:
    """Return what stands for a key: digests of its upstream, and of the key there. It says nothing of its place.

    credential: the key, its organization and its project.
    """
    upstream = hashlib.sha256(base_url.rstrip("/").encode()).hexdigest()[:12]
    key = hashlib.sha256("\0".join(("owner", base_url.rstrip("/"), *credential)).encode()).hexdigest()[:24]
    return f"{upstream}-{key}"


def digest_of(id_: str) -> str:
    """Return what an id is remembered by."""
    return hashlib.sha256(id_.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class OwnerTable:
    """Owners by the digest of the object's id. `wall` is in Unix seconds."""

    def __init__(self) -> None:
        self._owners: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def record(self, digest: str, owner: str, wall: float, only_new: bool = False) -> bool:
        """Remember an owner; return whether others should be told.

        owner: `Owner.text`. only_new: the owner of an object that is known stays.
        """
        old = self._owners.get(digest)
        if old is not None and wall - old[1] >= KEPT_FOR:
            old = None
        if old is not None and only_new:
            owner = old[0]
        told = old is None or old[0] != owner or wall - old[1] > TELL_AGAIN
        if told:
            self._owners[digest] = owner, wall
        self._owners.move_to_end(digest)
        if len(self._owners) > MAX_OBJECTS:
            self._owners.popitem(last=False)
        return told

    def get(self, digest: str, wall: float) -> str | None:
        """Return the owner of an object; None if it is not known."""
        found = self._owners.get(digest)
        return found[0] if found is not None and wall - found[1] < KEPT_FOR else None
