"""A stored answer: the bytes that came, in the form they came in, and what it takes to give them again."""

from __future__ import annotations

import sys
from typing import Final, Literal

import msgspec

from ..cost.usage import Usage

Form = Literal["json", "sse"]


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One complete answer, which names its own key. Never changed, never part of a cycle (so gc=False).

    headers: the end-to-end ones to give out on a hit, already filtered; body: as it came, decoded;
    usage_span: where in an `sse` body the usage chunk lies (from, to), None where there is none;
    usage_asked: the upstream was asked for that chunk, so where it is missing, there is none to be had;
    stored_at: Unix seconds; ttl: seconds; model: the one asked for; answer_model: the one that answered;
    cost: what a hit saves in USD, exact, None where unknown; sampled: neither temperature 0 nor a seed;
    request: the canonical request, where the settings say that it is kept (`cache.store_requests`);
    estimated: usage and cost are its share of a batch's, by length.
    traits: digests of what was asked, see `core.explain`.
    bare: the key less the client's scope, by which replay finds it; '' where that is the key itself.
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
        """Bytes of memory this entry takes in a store, overhead included."""
        headers = sum(len(name) + len(value) for name, value in self.headers)
        texts = len(self.key) + len(self.bare) + len(self.model) + len(self.answer_model or "") + len(self.namespace)
        texts += len(self.traits)
        tags = sum(map(len, self.tags)) + len(self.tags) * (_TEXT + _SLOT)
        request = 0 if self.request is None else sys.getsizeof(self.request)
        return OVERHEAD + len(self.body) + headers + len(self.headers) * _HEADER + texts + tags + request

    def body_for(self, with_usage: bool) -> bytes | None:
        """The body for a client that did, or did not, ask for the usage chunk. None: this entry cannot say.

        Without: the stored bytes less the usage chunk. With: the stored bytes, provided that the usage is in
        them or that the upstream was asked for it. `json` has its usage always.
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
        """Unix seconds."""
        return self.stored_at + self.ttl

    def fresh(self, wall: float) -> bool:
        """Whether the lifetime has not ended at `wall` (Unix seconds)."""
        return wall < self.stored_at + self.ttl

    def age(self, wall: float) -> int:
        """Whole seconds since it was stored; 0 where the clock was set back."""
        return max(0, int(wall - self.stored_at))

    def remaining(self, wall: float) -> int:
        """Whole seconds of lifetime left; negative when stale."""
        return int(self.stored_at + self.ttl - wall)


_BYTES: Final = sys.getsizeof(b"")
_TEXT: Final = sys.getsizeof("")
_NUMBER: Final = sys.getsizeof(0.0)
_TUPLE: Final = sys.getsizeof(())
_SLOT: Final = 8
_GC_HEAD: Final = 16
_HEADER: Final = _SLOT + _TUPLE + _GC_HEAD + 2 * (_SLOT + _BYTES)
_STORE: Final = 2 * (_TUPLE + _GC_HEAD + 2 * _SLOT) + _NUMBER + 2 * _SLOT + 136
"""What the memory store keeps for an entry: its name, a line in the calendar, a node of the ordered dict."""

OVERHEAD: Final = (
    sys.getsizeof(Entry("", "json", 200, (), b"", None, 0.0, 0.0, "", "", None, None, None, "", (), False))
    + _BYTES
    + 4 * _TEXT
    + 2 * _NUMBER
    + 3 * (_TUPLE + _GC_HEAD)
    + _STORE
)
"""Bytes an entry with an empty body and no headers takes: measured object sizes, for this Python."""
