"""Embeddings item by item: a batch of texts as its items, and answers made of items again (contract 7, Cache).

An item is one text or one array of tokens. It is kept under its own key as the answer to a request for it alone, so a
request for one item needs nothing of this, and what one batch bought serves every other. Vectors are bytes throughout:
neither floats nor base64 are ever written anew. The answer to a whole batch that went up as it came is kept beside its
items, where `max_entry` allows: the same request again gets the same bytes, without being read. An answer made of items
is not kept, for it can be made again.

A request is taken apart only where each of its fields says the same of every item (`_ITEMWISE`). An unknown field may
tie the items together (Jina's `late_chunking` embeds a text in the light of its neighbours), so it goes the way of
other requests: whole.

An item counts once, however often it stands in a batch: once it is sent, paid for, and saved.
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
from ..protocol.json_parse import DEEPEST, parse_leniently
from .entry import Entry
from .key import KeyParts, canonical, item_keys

MOST_ITEMS: Final = 2048
"""OpenAI, "Create embeddings": `input` has at most so many items."""

MOST_TOKENS: Final = 250_000
"""Tokens of one call, by estimate: OpenAI's limit is 300,000, and bytes / 4 is up to a sixth too low for prose."""

_ITEMWISE: Final = frozenset(
    {
        "model", "input", "dimensions", "encoding_format", "user",
        # Cohere, Voyage, NVIDIA, Jina, vLLM: what kind of text each is, how it is cut, how vectors are written
        "input_type", "task", "prompt_name", "truncate", "truncation", "truncate_prompt_tokens",
        "normalize", "normalized", "output_dimension", "output_dtype", "embedding_type",
    }
)  # fmt: skip
_MINUS: Final = re.compile(rb"[\[,\s]-")
_LARGEST_TOKEN: Final = 2**53


class CachedItem(msgspec.Struct, frozen=True, gc=False):
    """An item that is cached. vector: its JSON text."""

    vector: bytes
    entry: Entry


class EmbeddingBatch(msgspec.Struct, frozen=True):
    """A request for several items. An item's number is its place among the different ones, in order of appearance.

    texts: each item's JSON text; weights: its tokens, or UTF-8 bytes where it is text (`counted` says which); bare,
    keys: its cache key without and with the client's scope; order: the number of the item at each position; rest: the
    canonical request with null for its `input`; found: those that are cached, by number.
    """

    texts: tuple[bytes, ...]
    weights: tuple[int, ...]
    counted: bool
    unpartitioned_keys: tuple[str, ...]
    keys: tuple[str, ...]
    order: tuple[int, ...]
    rest: bytes
    found: Mapping[int, CachedItem] = {}

    def parts(self, bought: Container[int] = ()) -> list[tuple[int, ...]]:
        """The numbers of the items to buy, but for those `bought`: a call each, within what the API takes."""
        parts: list[tuple[int, ...]] = []
        part: list[int] = []
        tokens = 0
        for number in range(len(self.texts)):
            if number in self.found or number in bought:
                continue
            weight = self.weights[number] if self.counted else -(-self.weights[number] // 4)
            if part and (len(part) == MOST_ITEMS or tokens + weight > MOST_TOKENS):
                parts.append(tuple(part))
                part, tokens = [], 0
            part.append(number)
            tokens += weight
        return [*parts, tuple(part)] if part else parts

    @property
    def changes(self) -> bool:
        """Whether what goes upstream is not the client's own request."""
        return bool(self.found) or len(self.order) > len(self.texts) or len(self.parts()) > 1

    def request(self, number: int) -> str:
        """The canonical request for this item alone."""
        return set_field(self.rest, "input", self.texts[number]).decode()

    def input(self, numbers: Sequence[int]) -> bytes:
        """The value of `input` that asks for these items."""
        return b"[" + b",".join([self.texts[number] for number in numbers]) + b"]"


# -- requests ---------------------------------------------------------------------------------------------------------


def read_batch(raw: bytes, document: Mapping[str, Any], parts: KeyParts, drop: frozenset[str]) -> EmbeddingBatch | None:
    """The items of a request that has a cache key, made of `parts`; None: it is not to be taken apart.

    raw, document: its body, and that parsed; drop: the fields that are not in the key.
    """
    if not document.keys() <= _ITEMWISE | drop:
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
    """The items of an `input`: a text, tokens, or an array of either. None: it is nothing of the kind, or empty."""
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
        isinstance(item, list)
        and bool(item)
        and all(type(token) is int and 0 <= token < _LARGEST_TOKEN for token in item)
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
    """An embeddings answer, parsed as by `parse_leniently`, but each `embedding` is the bytes of its JSON text.

    That is six times as fast. An answer that is not of the usual form is parsed to the end, its vectors to lists: its
    items cannot be taken apart. ValueError where it is no JSON.
    """
    if body.isascii():  # the decoder does not look into the texts it passes over
        try:
            answer = _ANSWER.decode(body)
        except (msgspec.DecodeError, RecursionError):
            return parse_leniently(body)
        vectors = [bytes(datum.embedding) for datum in answer.data]
        brackets = len(vectors) + sum(vector[:1] == b"[" for vector in vectors)
        deep = body.count(b"[") + body.count(b"{") > brackets + DEEPEST  # only perhaps, which is enough
        if not deep and all(map(_is_vector, vectors)):
            data = [
                {"index": datum.index, "embedding": vector} for datum, vector in zip(answer.data, vectors, strict=True)
            ]
            named = ("model", "usage", "error", "service_tier")
            return {"data": data} | {name: getattr(answer, name) for name in named}
    return parse_leniently(body)


def _is_vector(text: bytes) -> bool:
    """Whether it is an array or a text, and not an empty one."""
    return text[:1] in (b"[", b'"') and (len(text) > 64 or len(text.translate(None, b" \t\r\n")) > 2)


def vectors_of(document: Mapping[str, Any]) -> list[bytes] | None:
    """The vectors of a whole answer from `read_answer`, by index; None where it is not of the usual form."""
    data = sorted(document["data"], key=lambda datum: datum["index"])
    vectors = [datum["embedding"] for datum in data]
    return vectors if type(vectors[0]) is bytes else None


def in_order(document: Mapping[str, Any]) -> bool:
    """Whether each embedding of a whole answer stands where its index says."""
    return all(datum["index"] == position for position, datum in enumerate(document["data"]))


def join(vectors: Mapping[int, bytes], order: Iterable[int], model: str | None, usage: Usage | None) -> bytes:
    """An answer as the API gives it. vectors: by item number; order: the number of the item at each position."""
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


def cached(entries: Mapping[int, Entry]) -> dict[int, CachedItem]:
    """Those of the entries, by item number, that are one vector each, and of one model: others cannot be compared."""
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
    """What is stored of a call for the items of these `numbers`, answered with these `vectors`.

    template: says what the entries have in common, and the usage of all of them together; price: None where that has
    no known cost.
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
                body=join({0: vector}, (0,), template.answer_model, share),
                usage=share,
                cost=usd(cost.usd) if cost is not None else None,
                request=batch.request(number) if template.request is not None else None,
                estimated=estimated,
            )
        )
    return entries


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """`total` in whole shares by weight, which add up to it."""
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + max(weight, 1))
    ends = [total * end // sums[-1] for end in sums]
    return [end - start for start, end in pairwise(ends)]


class Savings(msgspec.Struct, frozen=True):
    """What cached items would have cost. usage, cost: None where unknown; estimated: from apportioned counts."""

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
    """All of them together; None where one is unknown."""
    known = [usage for usage in usages if usage is not None]
    if len(known) < len(usages):
        return None
    return Usage(sum(usage.prompt_tokens for usage in known), 0, sum(usage.total_tokens for usage in known))


def made_of(key: str, batch: EmbeddingBatch) -> tuple[Entry, bytes]:
    """The answer to a request all of whose items are cached: what is to be said of it, and its body.

    As old as the oldest item, and over when the first one is.
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
    return entry, join(vectors, batch.order, oldest.answer_model, savings.usage)
