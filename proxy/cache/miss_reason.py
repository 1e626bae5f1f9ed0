"""Why a request missed: how it differs from the nearest stored request, without keeping either.

For each stored request a digest of each part of its key and of each top-level field of its body is kept, as a short
text in the entry's head (its field `traits`), where stores, lists and exported files have it:

    messages:7d1e0a… model:… temperature:… upstreams:…

A digest is 8 bytes of SHA-256, enough that two values never seem equal by chance. Digests are not salted: all
processes, and everybody who replays an exported file, would have to share the salt, and it would hide nothing. Whoever
can read the digest of a guessable field can read the whole response beside it, and can confirm a guess by the entry's
key as well.

Names are those in the body. A part of the key with the name of a field keeps it, and the field is called `body.NAME`.
`model` is the field and what it was mapped to; if it differs, `upstreams`, which follow from it, are not named. The
client has no digest: requests are compared within one client's, or without regard to clients.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Final, TypeVar
from urllib.parse import quote

import msgspec

from .entry import Entry
from .key import KeyParts

T = TypeVar("T")

MAIN_FIELDS: Final[Mapping[str, str]] = {
    "chat": "messages",
    "completions": "prompt",
    "embeddings": "input",
    "moderations": "input",
    "responses": "input",
}
"""Endpoint -> the field that holds the prompt."""

MAX_FIELDS: Final = 64
"""A body with more top-level fields, or with a longer name, has no digests, and its misses are always `new`."""
_MAX_NAME_LENGTH: Final = 64

_DIGITS: Final = 16

MAX_NAMED: Final = 3
"""The most differences that a header names."""

_PART_NAMES: Final = frozenset({"client", "namespace", "upstreams", "OpenAI-Beta", "sample", "query"})
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\Z")
_SMALL: Final = 256
_FIELDS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def field_digests_of(parts: KeyParts) -> str:
    """Return the digests of a request, `NAME:DIGEST` separated by spaces, the model first.

    An empty part has no digest. A request with too many fields has none at all: "".
    """
    fields = _FIELDS.decode(parts.body)
    if len(fields) > MAX_FIELDS or any(len(name) > _MAX_NAME_LENGTH for name in fields):
        return ""
    namespace = parts.namespace.rpartition("\n")[2]  # without the client
    asked = bytes(fields.pop("model", b""))
    digests = ["model:" + _digest(b"%b\n%b" % (_bytes(parts.model), asked))]
    for name, text in (
        ("namespace", namespace),
        ("upstreams", parts.upstreams),
        ("OpenAI-Beta", parts.beta),
        ("sample", parts.sample),
        ("query", parts.query),
    ):
        if text:
            digests.append(f"{name}:{_digest(_bytes(text))}")
    for name, raw in fields.items():
        value = bytes(raw)
        digest = _digest(value) if len(value) <= _SMALL else _digest_of(value)
        digests.append(f"{_field_name(name)}:{digest}")
    return " ".join(digests)


def differences(one: str, other: str) -> list[str]:
    """Return the sorted names of what differs between two texts of field digests."""
    names = {digest.partition(":")[0] for digest in {*one.split()} ^ {*other.split()}}
    if "model" in names:
        names.discard("upstreams")
    return sorted(names)


def nearest(candidates: Iterable[tuple[T, str]], field_digests: str) -> tuple[T, list[str]] | None:
    """Return the first of the candidates (what, its digests) that differs least, and the names of what differs.

    None if no candidate can be compared. Takes about 2 µs for each.
    """
    found: tuple[T, list[str]] | None = None
    for what, others in candidates if field_digests else ():
        if others:
            names = differences(field_digests, others)
            if found is None or len(names) < len(found[1]):
                found = what, names
    return found


def reason_of(endpoint: str, names: Sequence[str]) -> str:
    """Return the reason of a miss that differs in `names` from the nearest stored request; another prompt is `new`."""
    return "new" if not names or MAIN_FIELDS.get(endpoint) in names else shown_names(names)


def shown_names(names: Sequence[str]) -> str:
    """Return `differs: temperature, top_p` for a header: ASCII, with at most `MAX_NAMED` names."""
    shown = ", ".join(names[:MAX_NAMED])
    return f"differs: {shown}, ..." if len(names) > MAX_NAMED else f"differs: {shown}"


def why_missed(
    entry: Entry | None, other: Entry | None, wall: float, max_age: int | None, wants_usage: bool
) -> tuple[str, str] | None:
    """Return why the entries under the key do not serve, and the `fwd` of RFC 9211; None if nothing is stored.

    entry: in the form asked for. other: in the other form, which cannot be converted or does not serve either. wall:
    Unix seconds. max_age: seconds, as the client asked. wants_usage: the client asked for a stream's usage chunk.
    """
    stored = [one for one in (entry, other) if one is not None]
    if not stored:
        return None
    fresh = [one for one in stored if one.fresh(wall)]
    if not fresh:
        return "expired", "stale"
    young = [one for one in fresh if max_age is None or one.age(wall) <= max_age]
    if not young:
        return "max-age", "request"
    if entry in young and wants_usage and entry is not None and entry.body_for(True) is None:
        return "stored without usage", "uri-miss"
    return "stored in the other form", "uri-miss"


class _RecentRequest(msgspec.Struct, frozen=True, gc=False):
    key: str
    field_digests: str
    expires_at: float


class RecentRequests:
    """The requests whose responses were stored or found last, to compare a miss with. Bounded; takes a few µs.

    A miss is compared with the newest `_MAX_NEIGHBOURS` requests that had the same prompt. Clients are kept apart: none
    learns what another one asked.
    """

    def __init__(self, kept: int = 4096) -> None:
        self._kept = kept
        self._by_question: OrderedDict[tuple[str, str, str], list[_RecentRequest]] = OrderedDict()
        self._expiries: OrderedDict[str, float] = OrderedDict()

    def add(self, partition: str, entry: Entry) -> None:
        """Remember a stored response. partition: the client's."""
        if not entry.traits:
            return
        known = _RecentRequest(entry.key, entry.traits, entry.expires_at)
        main = _main_digest(entry.endpoint, entry.traits)
        question = partition, entry.endpoint, main
        neighbours = self._by_question.setdefault(question, [])
        neighbours[:] = [known, *[one for one in neighbours if one.key != known.key][: _MAX_NEIGHBOURS - 1]]
        self._by_question.move_to_end(question)
        self._expiries[entry.key] = entry.expires_at
        self._expiries.move_to_end(entry.key)
        for index in (self._by_question, self._expiries):
            if len(index) > self._kept:
                index.popitem(last=False)

    def clear(self) -> None:
        """Forget everything, after a purge."""
        self._by_question.clear()
        self._expiries.clear()

    def reason(self, partition: str, endpoint: str, key: str, field_digests: str, wall: float) -> str:
        """Return why nothing is stored for a request, in a few words."""
        if not field_digests:
            return "new"
        expiry = self._expiries.get(key)
        if expiry is not None:
            return "expired" if expiry <= wall else "gone"
        neighbours = self._by_question.get((partition, endpoint, _main_digest(endpoint, field_digests)), ())
        found = nearest(
            ((known, known.field_digests) for known in neighbours if known.expires_at > wall), field_digests
        )
        return shown_names(found[1]) if found is not None else "new"


_MAX_NEIGHBOURS: Final = 4


def _main_digest(endpoint: str, field_digests: str) -> str:
    """Return the name and digest of the prompt; "" if there is none."""
    _, name, rest = field_digests.partition(f" {MAIN_FIELDS.get(endpoint, '')}:")
    return name + rest[:_DIGITS] if name else ""


@lru_cache(1024)
def _field_name(name: str) -> str:
    if name in _PART_NAMES or name.startswith("body."):
        name = "body." + name
    return name if _PLAIN_NAME.match(name) else quote(name, safe="")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest_of(value: bytes) -> str:
    return sha256(value).hexdigest()[:_DIGITS]


_digest: Final = lru_cache(8192)(_digest_of)
"""Cached, since most values recur: models, temperatures, upstreams."""
