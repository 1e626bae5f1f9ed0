"""A stored response: its bytes, in the form in which they came, and what is needed to serve them again."""

from __future__ import annotations

import math
import sys
from typing import Final, Literal

import msgspec

from ..cost.usage import Usage

Form = Literal["json", "sse"]

MAX_CLOCK_SKEW: Final = 300.0
"""Seconds by which the clocks of machines that share a cache may differ."""


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One complete response with its own key. It never changes and is part of no reference cycle (so gc=False).

    headers: the end-to-end ones that a hit sends, already filtered. body: as it came, decoded. usage_span: where in an
    `sse` body the usage chunk is (from, to), None if there is none. usage_asked: the upstream was asked for that chunk,
    so if it is missing, there is none to be had. stored_at: Unix seconds. ttl: seconds. model: the one asked for;
    answer_model: the one that answered. cost: what a hit saves in USD, exact, None if unknown. sampled: the request had
    neither temperature 0 nor a seed. request: the canonical request, if `cache.store_requests` keeps it. estimated:
    usage and cost are its share of a batch's, by length. traits: field digests of the request, see `miss_reason`.
    bare: the key without the client's partition, by which replay finds it; '' if that is the key itself.
    """

    key: str
    form: Form
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    usage_span: tuple[int, int] | None
    stored_at: float
    ttl: float
    endpoint: str
    model: str
    answer_model: str | None
    usage: Usage | None
    cost: str | None
    namespace: str
    tags: tuple[str, ...]
    sampled: bool
    usage_asked: bool = False
    request: str | None = None
    estimated: bool = False
    traits: str = ""
    bare: str = ""

    @property
    def size(self) -> int:
        """Bytes of memory that the entry takes in a store, with overhead."""
        headers = sum(len(name) + len(value) for name, value in self.headers)
        texts = len(self.key) + len(self.bare) + len(self.model) + len(self.answer_model or "") + len(self.namespace)
        texts += len(self.traits)
        tags = sum(map(len, self.tags)) + len(self.tags) * (_TEXT + _SLOT)
        request = 0 if self.request is None else sys.getsizeof(self.request)
        return OVERHEAD + len(self.body) + headers + len(self.headers) * _HEADER + texts + tags + request

    def body_for(self, with_usage: bool) -> bytes | None:
        """Return the body for a client that did, or did not, ask for the usage chunk; None if this entry has none.

        Without it: the stored bytes without the usage chunk. With it: the stored bytes, if the usage is in them or the
        upstream was asked for it. The `json` form always has its usage.
        """
        if self.form == "json":
            return self.body
        if with_usage:
            return self.body if self.usage_asked or self.usage is not None else None
        if self.usage_span is None:
            return self.body
        start, end = self.usage_span
        return self.body[:start] + self.body[end:]

    @property
    def expires_at(self) -> float:
        """The end of the lifetime, Unix seconds."""
        return self.stored_at + self.ttl

    def plausible(self, wall: float, past_end: float = 0.0) -> bool:
        """Return whether it was stored before `wall` (Unix seconds), as far as clocks agree.

        What was stored while a clock was ahead would be fresh for as long as that clock was wrong. past_end: infinite
        if age does not matter.
        """
        return self.stored_at - wall <= MAX_CLOCK_SKEW or past_end == math.inf

    def usable(self, wall: float, past_end: float = 0.0) -> bool:
        """Return whether it may serve at `wall` (Unix seconds), up to `past_end` seconds after its end."""
        return wall < self.stored_at + self.ttl + past_end and self.plausible(wall, past_end)

    def fresh(self, wall: float) -> bool:
        """Return whether the lifetime has not ended at `wall` (Unix seconds)."""
        return self.usable(wall)

    def age(self, wall: float) -> int:
        """Return the whole seconds since it was stored; 0 if the clock was set back."""
        return max(0, int(wall - self.stored_at))

    def remaining(self, wall: float) -> int:
        """Return the whole seconds of lifetime left, at most all of it; negative if it is stale."""
        return int(min(self.ttl, self.stored_at + self.ttl - wall))


_BYTES: Final = sys.getsizeof(b"")
_TEXT: Final = sys.getsizeof("")
_NUMBER: Final = sys.getsizeof(0.0)
_TUPLE: Final = sys.getsizeof(())
_SLOT: Final = 8
_GC_HEAD: Final = 16
_HEADER: Final = _SLOT + _TUPLE + _GC_HEAD + 2 * (_SLOT + _BYTES)
_STORE: Final = 2 * (_TUPLE + _GC_HEAD + 2 * _SLOT) + _NUMBER + 2 * _SLOT + 136
"""Bytes that the memory store keeps for an entry: its name, its place in the expiry list and in the ordered dict."""

OVERHEAD: Final = (
    sys.getsizeof(Entry("", "json", 200, (), b"", None, 0.0, 0.0, "", "", None, None, None, "", (), False))
    + _BYTES
    + 4 * _TEXT
    + 2 * _NUMBER
    + 3 * (_TUPLE + _GC_HEAD)
    + _STORE
)
"""Bytes of an entry with an empty body and no headers, by the sizes of objects in this Python."""
