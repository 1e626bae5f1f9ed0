"""Embeddings by item: a batch of texts split into its items, and responses put together from items (`docs/caching.md`).

An item is one text or one array of tokens. It is stored under its own key as the response to a request for it alone, so
requests for one item need nothing of this, and items fetched in one batch serve every other batch. Vectors are bytes
throughout: floats and base64 are never written anew. The response to a whole batch that was sent unchanged is stored
beside its items, if `max_entry` allows: the same request again gets the same bytes without being parsed. A response
put together from items is not stored, since it can be made again.

A request is split only if each of its fields means the same for every item (`_PER_ITEM_FIELDS`). An unknown field may
connect the items (Jina's `late_chunking` embeds a text in the light of its neighbours), so such a request is cached as
a whole only.

An item counts once, however often it occurs in a batch: it is sent, paid for and saved once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from decimal import Decimal
from itertools import pairwise
from typing import Any, Final

import msgspec
import orjson

from ..cost.pricing import Cost, usd
from ..cost.usage import Usage
from ..protocol.json_edit import set_field
from ..protocol.json_parse import MAX_DEPTH, parse_leniently
from .entry import Entry
from .key import KeyParts, canonical, item_keys

MAX_ITEMS: Final = 2048
"""The most items of an `input` (OpenAI's API reference, *Create embeddings*)."""

MAX_CALL_TOKENS: Final = 250_000
"""The most tokens of one call, by estimate: OpenAI allows 300,000, and bytes / 4 is up to a sixth too low for prose."""

_PER_ITEM_FIELDS: Final = frozenset(
    {
        "model", "input", "dimensions", "encoding_format", "user",
        # Cohere, Voyage, NVIDIA, Jina, vLLM: the kind of text, how it is truncated, the format of vectors
        "input_type", "task", "prompt_name", "truncate", "truncation", "truncate_prompt_tokens",
        "normalize", "normalized", "output_dimension", "output_dtype", "embedding_type",
    }
)  # fmt: skip
_MINUS: Final = re.compile(rb"[\[,\s]-")
_MAX_TOKEN: Final = 2**53


class CachedItem(msgspec.Struct, frozen=True, gc=False):
    """A cached item. vector: its JSON text."""

    vector: bytes
    entry: Entry


class EmbeddingBatch(msgspec.Struct, frozen=True):
    """A request for several items. An item's number is its place among the different ones, in order of appearance.

    texts: each item's JSON text. weights: its tokens, or UTF-8 bytes if it is text (`counted` says which).
    unpartitioned_keys, keys: its cache key without and with the client's partition. order: the item's number at each
    position. rest: the canonical request with null as its `input`. found: the cached items, by number.
    """

    texts: tuple[bytes, ...]
    weights: tuple[int, ...]
    counted: bool
    unpartitioned_keys: tuple[str, ...]
    keys: tuple[str, ...]
    order: tuple[int, ...]
    rest: bytes
    found: Mapping[int, CachedItem] = {}

    def calls_to_make(self, fetched: Container[int] = ()) -> list[tuple[int, ...]]:
        """Return the numbers of the items to fetch, without those in `fetched`, as calls of an allowed size."""
        calls: list[tuple[int, ...]] = []
        call: list[int] = []
        tokens = 0
        for number in range(len(self.texts)):
            if number in self.found or number in fetched:
                continue
            weight = self.weights[number] if self.counted else -(-self.weights[number] // 4)
            if call and (len(call) == MAX_ITEMS or tokens + weight > MAX_CALL_TOKENS):
                calls.append(tuple(call))
                call, tokens = [], 0
            call.append(number)
            tokens += weight
        return [*calls, tuple(call)] if call else calls

    @property
    def changes_request(self) -> bool:
        """Whether the requests sent upstream differ from the client's own."""
        return bool(self.found) or len(self.order) > len(self.texts) or len(self.calls_to_make()) > 1

    def request(self, number: int) -> str:
        """Return the canonical request for this item alone."""
        return set_field(self.rest, "input", self.texts[number]).decode()

    def input(self, numbers: Sequence[int]) -> bytes:
        """Return the value of `input` for these items."""
        return b"[" + b",".join([self.texts[number] for number in numbers]) + b"]"


# -- requests ---------------------------------------------------------------------------------------------------------


def read_batch(raw: bytes, document: Mapping[str, Any], parts: KeyParts, drop: frozenset[str]) -> EmbeddingBatch | None:
    """Return the items of a request whose cache key is made of `parts`; None if it must not be split.

    raw, document: its body, and the same parsed. drop: the fields that are not in the key.
    """
    if not document.keys() <= _PER_ITEM_FIELDS | drop:
        return None
    items = _items(document.get("input"))
    if items is None:
        return None
    counted = not isinstance(items[0], str)
    if counted and _MINUS.search(raw):
        return None  # -0 would be read as 0, another spelling of a token
    numbers: dict[bytes, int] = {}
    order = tuple([numbers.setdefault(orjson.dumps(item), len(numbers)) for item in items])
    texts = tuple(numbers)
    weights = [text.count(b",") + 1 if counted else len(text) - 2 for text in texts]
    rest = canonical(set_field(raw, "input", b"null"), drop)
    keys = item_keys(msgspec.structs.replace(parts, body=rest), texts)
    return EmbeddingBatch(texts, tuple(weights), counted, tuple(keys), tuple(keys), order, rest)


def _items(given: object) -> list[Any] | None:
    """Return the items of an `input`: a text, tokens, or an array of either; None for anything else, or if empty."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        return None
    if all(type(item) is str for item in given):
        return given
    if _is_tokens(given):
        return [given]
    return given if all(map(_is_tokens, given)) else None


def _is_tokens(item: object) -> bool:
    return (
        isinstance(item, list) and bool(item) and all(type(token) is int and 0 <= token < _MAX_TOKEN for token in item)
    )


# -- answers ----------------------------------------------------------------------------------------------------------


class _Datum(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    index: int
    embedding: msgspec.Raw
    object: str = "embedding"


class _Answer(msgspec.Struct, gc=False):
    data: list[_Datum]
    model: Any = None
    usage: Any = None
    error: Any = None
    service_tier: Any = None


_ANSWER: Final = msgspec.json.Decoder(_Answer)


def read_answer(body: bytes) -> Any:
    """Return an embeddings response, parsed as by `parse_leniently`, but each `embedding` is its JSON text.

    That is six times as fast. A response of another form is parsed completely, its vectors to lists; it is cached as a
    whole only. Raises ValueError if it is no JSON.
    """
    if body.isascii():  # the decoder does not look into the texts it passes over
        try:
            answer = _ANSWER.decode(body)
        except (msgspec.DecodeError, RecursionError):
            return parse_leniently(body)
        vectors = [bytes(datum.embedding) for datum in answer.data]
        brackets = len(vectors) + sum(vector[:1] == b"[" for vector in vectors)
        deep = body.count(b"[") + body.count(b"{") > brackets + MAX_DEPTH  # only perhaps, which is enough
        if not deep and all(map(_is_vector, vectors)):
            data = [
                {"index": datum.index, "embedding": vector} for datum, vector in zip(answer.data, vectors, strict=True)
            ]
            named = ("model", "usage", "error", "service_tier")
            return {"data": data} | {name: getattr(answer, name) for name in named}
    return parse_leniently(body)


def _is_vector(text: bytes) -> bool:
    """Return whether it is an array or a text, and not empty."""
    return text[:1] in (b"[", b'"') and (len(text) > 64 or len(text.translate(None, b" \t\r\n")) > 2)


def vectors_of(document: Mapping[str, Any]) -> list[bytes] | None:
    """Return the vectors of a complete response from `read_answer`, by index; None if it is not of the usual form."""
    data = sorted(document["data"], key=lambda datum: datum["index"])
    vectors = [datum["embedding"] for datum in data]
    return vectors if type(vectors[0]) is bytes else None


def in_order(document: Mapping[str, Any]) -> bool:
    """Return whether each embedding of a complete response is where its index says."""
    return all(datum["index"] == position for position, datum in enumerate(document["data"]))


def answer_body(vectors: Mapping[int, bytes], order: Iterable[int], model: str | None, usage: Usage | None) -> bytes:
    """Return a response as the API writes it. vectors: by item number. order: the item's number at each position."""
    data = b",".join(
        [
            b'{"object":"embedding","index":%d,"embedding":%b}' % (index, vectors[number])
            for index, number in enumerate(order)
        ]
    )
    named = b"" if model is None else b',"model":' + orjson.dumps(model)
    used = b"" if usage is None else b',"usage":{"prompt_tokens":%d,"total_tokens":%d}' % _tokens(usage)
    return b'{"object":"list","data":[' + data + b"]" + named + used + b"}"


def _tokens(usage: Usage) -> tuple[int, int]:
    return usage.prompt_tokens, usage.total_tokens


# -- items in the cache -----------------------------------------------------------------------------------------------


def cached_items(entries: Mapping[int, Entry]) -> dict[int, CachedItem]:
    """Return the entries, by item number, that have one vector each, if one model made all of them; else none."""
    found: dict[int, CachedItem] = {}
    for number, entry in entries.items():
        try:
            document = read_answer(entry.body)
            vectors = vectors_of(document) if len(document["data"]) == 1 else None
        except (ValueError, TypeError, KeyError):
            continue
        if vectors is not None:
            found[number] = CachedItem(vectors[0], entry)
    return found if len({one.entry.answer_model for one in found.values()}) < 2 else {}


def item_entries(
    template: Entry,
    batch: EmbeddingBatch,
    numbers: Sequence[int],
    vectors: Sequence[bytes],
    price: Callable[[Usage], Cost | None] | None,
) -> list[Entry]:
    """Return the entries of a call for the items of these `numbers`, answered with these `vectors`.

    template: what the entries have in common, and their usage together. price: None if the call has no known cost.
    """
    weights = [batch.weights[number] for number in numbers]
    shares: list[Usage] | list[None] = [None] * len(numbers)
    estimated = False
    if template.usage is not None:
        counts = zip(*[apportion(total, weights) for total in _tokens(template.usage)], strict=True)
        shares = [Usage(prompt, 0, total) for prompt, total in counts]
        estimated = len(numbers) > 1 and not (batch.counted and sum(weights) == template.usage.prompt_tokens)
    entries = []
    for number, vector, share in zip(numbers, vectors, shares, strict=True):
        cost = price(share) if price is not None and share is not None else None
        entries.append(
            msgspec.structs.replace(
                template,
                key=batch.keys[number],
                bare=batch.unpartitioned_keys[number] if batch.unpartitioned_keys[number] != batch.keys[number] else "",
                body=answer_body({0: vector}, (0,), template.answer_model, share),
                usage=share,
                cost=usd(cost.usd) if cost is not None else None,
                request=batch.request(number) if template.request is not None else None,
                estimated=estimated,
            )
        )
    return entries


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """Return `total` in whole shares by weight, which add up to it."""
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + max(weight, 1))
    ends = [total * end // sums[-1] for end in sums]
    return [end - start for start, end in pairwise(ends)]


class Savings(msgspec.Struct, frozen=True):
    """What cached items would have cost. usage, cost: None if unknown. estimated: from apportioned counts."""

    usage: Usage | None
    cost: str | None
    estimated: bool


def savings_of(found: Iterable[CachedItem]) -> Savings:
    entries = [one.entry for one in found]
    costs = [Decimal(entry.cost) for entry in entries if entry.cost is not None]
    return Savings(
        total_usage([entry.usage for entry in entries]),
        usd(sum(costs, Decimal(0))) if len(costs) == len(entries) else None,
        any(entry.estimated for entry in entries),
    )


def total_usage(usages: Sequence[Usage | None]) -> Usage | None:
    """Return the sum; None if one of them is unknown."""
    known = [usage for usage in usages if usage is not None]
    if len(known) < len(usages):
        return None
    return Usage(sum(usage.prompt_tokens for usage in known), 0, sum(usage.total_tokens for usage in known))


def answer_from_items(key: str, batch: EmbeddingBatch) -> tuple[Entry, bytes]:
    """Return the response to a request whose items are all cached: an entry that describes it, and its body.

    It is as old as the oldest item, and expires with the first one.
    """
    entries = [found.entry for found in batch.found.values()]
    oldest = min(entries, key=lambda entry: entry.stored_at)
    savings = savings_of(batch.found.values())
    vectors = {number: found.vector for number, found in batch.found.items()}
    entry = msgspec.structs.replace(
        oldest,
        key=key,
        body=b"",
        ttl=min(entry.expires_at for entry in entries) - oldest.stored_at,
        usage=savings.usage,
        cost=savings.cost,
        tags=(),
        estimated=savings.estimated,
    )
    return entry, answer_body(vectors, batch.order, oldest.answer_model, savings.usage)
