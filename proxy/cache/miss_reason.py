"""Why a request missed: how it differs from the nearest stored one, without keeping either.

Of every stored request a digest is kept for each part of its key and each top-level field of its body, as a short text
in the entry's head (`traits`), where stores, lists and exported files have it:

    messages:7d1e0a… model:… temperature:… upstreams:…

8 bytes of SHA-256 each: enough that two values are never taken for one by chance. They are not salted: a secret would
have to be shared by all processes and with whoever replays an exported file, and would hide nothing, since who can read
the digest of a guessable field reads the whole answer beside it, and can confirm a guess by the entry's key as well.

Names are as in the body. A part named like a field goes by its plain name, the field by `body.NAME`. `model` stands for
the field and for what it was mapped to; where it differs, `upstreams`, which follow from it, are not named. Whose
request it was has no digest: requests are compared within one client's, or without regard to it.
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
"""Endpoint -> the field that says what is asked. The others say how."""

MOST_FIELDS: Final = 64
"""A body with more top-level fields than this, or with a longer name, has no traits: it is only `new`."""
_LONGEST_NAME: Final = 64

_DIGITS: Final = 16

MOST_NAMED: Final = 3
"""So many differences are named in a header."""

_PARTS: Final = frozenset({"client", "namespace", "upstreams", "OpenAI-Beta", "sample", "query"})
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\Z")
_SMALL: Final = 256
_FIELDS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def field_digests_of(parts: KeyParts) -> str:
    """The digests of a request, `NAME:DIGEST` with spaces between, the model first. An empty part has none; nothing
    has where there are too many fields: "".
    """
    fields = _FIELDS.decode(parts.body)
    if len(fields) > MOST_FIELDS or any(len(name) > _LONGEST_NAME for name in fields):
        return ""
    namespace = parts.namespace.rpartition("\n")[2]  # less the client, who is no part of what was asked
    asked = bytes(fields.pop("model", b""))
    traits = ["model:" + _digest(b"%b\n%b" % (_bytes(parts.model), asked))]
    for name, text in (
        ("namespace", namespace),
        ("upstreams", parts.upstreams),
        ("OpenAI-Beta", parts.beta),
        ("sample", parts.sample),
        ("query", parts.query),
    ):
        if text:
            traits.append(f"{name}:{_digest(_bytes(text))}")
    for name, raw in fields.items():
        value = bytes(raw)
        digest = _digest(value) if len(value) <= _SMALL else _digest_of(value)
        traits.append(f"{_field_name(name)}:{digest}")
    return " ".join(traits)


def differences(one: str, other: str) -> list[str]:
    """The names of what is not the same in both, sorted."""
    names = {trait.partition(":")[0] for trait in {*one.split()} ^ {*other.split()}}
    if "model" in names:
        names.discard("upstreams")
    return sorted(names)


def nearest(candidates: Iterable[tuple[T, str]], traits: str) -> tuple[T, list[str]] | None:
    """Of (what, its traits) the first that differs least from `traits`, and in what; [] where it is in nothing.

    None: none can be compared. About 2 us each.
    """
    found: tuple[T, list[str]] | None = None
    for what, others in candidates if traits else ():
        if others:
            names = differences(traits, others)
            if found is None or len(names) < len(found[1]):
                found = what, names
    return found


def reason_of(endpoint: str, names: Sequence[str]) -> str:
    """What a miss is called that differs so from its nearest neighbour: where it asks something else, it is `new`."""
    return "new" if not names or MAIN_FIELDS.get(endpoint) in names else shown_names(names)


def shown_names(names: Sequence[str]) -> str:
    """`differs: temperature, top_p`, for a header: ASCII, and at most a few names."""
    shown = ", ".join(names[:MOST_NAMED])
    return f"differs: {shown}, ..." if len(names) > MOST_NAMED else f"differs: {shown}"


def why_missed(
    entry: Entry | None, other: Entry | None, wall: float, max_age: int | None, wants_usage: bool
) -> tuple[str, str] | None:
    """Why what is stored under the very key does not serve, and the `fwd` of RFC 9211; None: nothing is stored.

    entry: in the form asked for; other: in the other form, which could not be converted or does not serve either.
    """
    found = [stored for stored in (entry, other) if stored is not None]
    if not found:
        return None
    fresh = [stored for stored in found if stored.fresh(wall)]
    if not fresh:
        return "expired", "stale"
    young = [stored for stored in fresh if max_age is None or stored.age(wall) <= max_age]
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
    """The requests whose answers were stored or found last, to compare a miss with. Bounded; a few us a question.

    Its neighbours are those that asked the same, the newest `_NEIGHBOURS` of them. Clients never see each other's: what
    one asked is nobody else's business.
    """

    def __init__(self, kept: int = 4096) -> None:
        self._kept = kept
        self._same_question: OrderedDict[tuple[str, str, str], list[_RecentRequest]] = OrderedDict()
        self._ends: OrderedDict[str, float] = OrderedDict()

    def add(self, scope: str, entry: Entry) -> None:
        """An answer is stored, for a client of this scope."""
        if not entry.traits:
            return
        known = _RecentRequest(entry.key, entry.traits, entry.expires_at)
        main = _main(entry.endpoint, entry.traits)
        question = scope, entry.endpoint, main
        neighbours = self._same_question.setdefault(question, [])
        neighbours[:] = [known, *[one for one in neighbours if one.key != known.key][: _NEIGHBOURS - 1]]
        self._same_question.move_to_end(question)
        self._ends[entry.key] = entry.expires_at
        self._ends.move_to_end(entry.key)
        for index in (self._same_question, self._ends):
            if len(index) > self._kept:
                index.popitem(last=False)

    def clear(self) -> None:
        """Answers were thrown away, no matter which."""
        self._same_question.clear()
        self._ends.clear()

    def reason(self, scope: str, endpoint: str, key: str, traits: str, wall: float) -> str:
        """Why nothing is stored for a request, in a few words."""
        if not traits:
            return "new"
        end = self._ends.get(key)
        if end is not None:
            return "expired" if end <= wall else "gone"
        neighbours = self._same_question.get((scope, endpoint, _main(endpoint, traits)), ())
        found = nearest(((known, known.field_digests) for known in neighbours if known.expires_at > wall), traits)
        return shown_names(found[1]) if found is not None else "new"


_NEIGHBOURS: Final = 4


def _main(endpoint: str, traits: str) -> str:
    """The trait of what is asked; "" where there is none."""
    _, name, rest = traits.partition(f" {MAIN_FIELDS.get(endpoint, '')}:")
    return name + rest[:_DIGITS] if name else ""


@lru_cache(1024)
def _field_name(name: str) -> str:
    if name in _PARTS or name.startswith("body."):
        name = "body." + name
    return name if _PLAIN_NAME.match(name) else quote(name, safe="")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest_of(value: bytes) -> str:
    return sha256(value).hexdigest()[:_DIGITS]


_digest: Final = lru_cache(8192)(_digest_of)
"""Most values come again and again: models, temperatures, upstreams."""
