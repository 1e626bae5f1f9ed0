"""The cache key: which requests are the same request (`docs/caching.md`).

Two requests share a key only if they differ in nothing that can change the response. Whatever is not named here is in.

| part of the request                              | key | why                                               |
|--------------------------------------------------|-----|---------------------------------------------------|
| endpoint, query string, `OpenAI-Beta`            | in  | choose another operation or behaviour             |
| namespace asked for, sample                      | in  | separate caches, as the client wants              |
| the client's partition (`partitioned`)           | in  | separate caches, as the operator wants            |
| model after mapping                              | in  | an alias may be pointed at another model          |
| upstreams (base URL, api-version, deployment)    | in  | other upstreams answer otherwise; `cache_as` joins|
| every body field, known or unknown, at any depth | in  | a list of known ones is out of date some day      |
| absent / null / 0 / false / "" of a field        | in  | five different requests                           |
| how a number is written (1, 1.0, 1e0, -0)        | in  | providers may tell them apart                     |
| order of array items                             | in  | messages, tools and inputs are ordered            |
| order of object members, white space, escapes    | out | the same JSON document                            |
| `stream`, `stream_options`                       | out | the form of the answer: an entry names its own    |
| `cache.ignore_fields` at top level, by default   | out | the provider's bookkeeping, no part of the prompt.|
| `user`, `metadata`, `safety_identifier`,         |     | In on `responses`, whose answers echo them        |
| `prompt_cache_key`, `prompt_cache_retention`     |     |                                                   |
| all other headers                                | out | differ between identical calls of one SDK         |

Bodies without one certain meaning have no key (`NotCacheable`): they are forwarded uncached. `fields` decides which
requests are not cached because of what they ask for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Final

import msgspec
import orjson

from ..protocol.json_parse import MAX_DEPTH, is_deeper

FORMAT_VERSION: Final = "1"
"""Part of every key. It is raised if keys are made differently or entries change their meaning: old ones go unread."""


class NotCacheable(Exception):
    """The body has no certain canonical form, although it can be read. `reason`: a word or two for a header."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class KeyParts(msgspec.Struct, frozen=True):
    """Everything that a key is made of. upstreams: the identity of those that may serve it. body: from `canonical`."""

    endpoint: str
    namespace: str
    model: str
    upstreams: str
    beta: str
    sample: str
    query: str
    body: bytes


def canonical(raw: bytes, drop: frozenset[str]) -> bytes:
    """Return one spelling for all JSON texts that mean the object `raw`, without its top-level members in `drop`.

    Members are sorted, strings are plain UTF-8, numbers stay as written and are never converted (so a number of a
    million digits costs nothing). The work is linear in the size of `raw`.

    Raises ValueError if `raw` is not JSON in UTF-8 (a byte order mark is not allowed), and NotCacheable for: `not an
    object`, `duplicate keys` at any depth, `NaN` and infinities, `depth` beyond MAX_DEPTH, `unicode` (half a surrogate
    pair, which UTF-8 cannot hold). Nothing else.
    """
    text = raw.decode()
    try:
        document = _DECODER.decode(text)
    except (NotCacheable, ValueError, RecursionError):
        if is_deeper(raw):
            raise NotCacheable("depth") from None
        _SYNTAX.decode(text)
        raise
    if type(document) is not dict:
        raise NotCacheable("not an object")
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _is_deeper(document, MAX_DEPTH):
        raise NotCacheable("depth")
    for name in drop:
        document.pop(name, None)
    try:
        return orjson.dumps(document, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        raise NotCacheable("unicode") from None


def cache_key(parts: KeyParts) -> str:
    """Return the key as 64 hex digits. Each part is preceded by its length, so that no two lists of parts collide."""
    texts = (
        FORMAT_VERSION,
        parts.endpoint,
        parts.namespace,
        parts.model,
        parts.upstreams,
        parts.beta,
        parts.sample,
        parts.query,
    )
    # surrogatepass: a header may hold any byte, which arrives here as half a surrogate pair.
    head = "".join([f"{len(text)}:{text}" for text in texts]).encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(b"%b%d:" % (head, len(parts.body)))
    digest.update(parts.body)
    return digest.hexdigest()


def partitioned(unpartitioned_key: str, partition: str) -> str:
    """Return the key for one client: the unpartitioned key itself if the client shares with all ('').

    It is made from the unpartitioned key, so the body is digested once, and replay finds an entry without its client.
    """
    if not partition:
        return unpartitioned_key
    return hashlib.sha256(
        f"{len(partition)}:{partition}{unpartitioned_key}".encode("utf-8", "surrogatepass")
    ).hexdigest()


def item_keys(parts: KeyParts, items: Iterable[bytes]) -> list[str]:
    """Return the keys of single items of an `input`, each given as its canonical text; `parts.body` has no `input`.

    No request has such a key, since the endpoint's name differs.
    """
    head = cache_key(msgspec.structs.replace(parts, endpoint=f"{parts.endpoint}, one item"))
    return [hashlib.sha256(b"%b%b" % (head.encode(), item)).hexdigest() for item in items]


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(members)
    if len(document) != len(members):
        raise NotCacheable("duplicate keys")
    return document


def _no_constant(name: str) -> None:
    raise NotCacheable("NaN")


# A Fragment is written as it is, so a number keeps its spelling. orjson has no hooks for decoding; the scanner of the
# standard library is in C with hooks, too.
_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_int=orjson.Fragment,
    parse_float=orjson.Fragment,
    parse_constant=_no_constant,
)

# A hook's NotCacheable ends the decoding early. If the rest is not JSON, that error comes first.
_SYNTAX: Final = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)


def _is_deeper(document: object, limit: int) -> bool:
    level = [document]
    for _ in range(limit):
        level = [
            child
            for container in level
            for child in (container.values() if type(container) is dict else container)  # type: ignore[attr-defined]
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return False
    return True
