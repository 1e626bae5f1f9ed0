"""Which key served a prompt's beginning last, so that the upstream's prompt cache is used (contract 7, Keys)."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Final

import orjson

HEAD: Final = 4096
"""Bytes of a prompt's beginning that decide: 1,024 tokens, from which on OpenAI caches prompts, at 4 bytes a token."""

TTL: Final = 3600.0
"""Seconds a key is remembered: OpenAI drops a cached prompt within an hour of its last use
(https://platform.openai.com/docs/guides/prompt-caching)."""

MAX_PREFIXES: Final = 20_000

_BEGINNINGS: Final = ("instructions", "tools", "functions", "messages", "input", "prompt")
"""Fields of a prompt, in the order in which a model reads them."""

_CACHED: Final = frozenset({"chat", "completions", "responses"})


def prefix_of(endpoint: str, document: Mapping[str, Any], model: str) -> bytes:
    """A digest of what decides where a prompt is cached: `prompt_cache_key`, else the first `HEAD` bytes of the
    prompt; b"" for prompts too short to be cached, and for endpoints that cache none.
    """
    if endpoint not in _CACHED:
        return b""
    digest = hashlib.sha256(orjson.dumps([endpoint, model[:256]]) if _encodable(model) else b"")
    size = 0
    pieces = []
    for piece in _pieces(document):
        pieces.append(piece[: HEAD - size])
        size += len(pieces[-1])
        if size >= HEAD:
            break
    if size < HEAD:
        return b""
    named = document.get("prompt_cache_key")
    if isinstance(named, str) and named:
        digest.update(b"named" + named.encode("utf-8", "surrogatepass"))
    else:
        digest.update(b"".join(pieces))
    return digest.digest()


def _pieces(document: Mapping[str, Any]) -> Iterator[bytes]:
    for name in _BEGINNINGS:
        value = document.get(name)
        if isinstance(value, str):
            yield value.encode("utf-8", "surrogatepass")
        elif isinstance(value, list):
            for item in value:
                try:
                    yield orjson.dumps(item)
                except (TypeError, ValueError):  # numbers beyond 64 bits, lone surrogates
                    yield repr(item).encode("utf-8", "surrogatepass")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class PromptAffinity:
    """The key each prefix was served by last. `now` is monotonic seconds."""

    def __init__(self) -> None:
        self._homes: OrderedDict[bytes, tuple[str, float]] = OrderedDict()

    def home(self, prefix: bytes, now: float) -> str | None:
        """The label of the key, None where it is not known or too long ago."""
        found = self._homes.get(prefix)
        return found[0] if found is not None and now - found[1] < TTL else None

    def record(self, prefix: bytes, label: str, now: float) -> None:
        self._homes[prefix] = (label, now)
        self._homes.move_to_end(prefix)
        if len(self._homes) > MAX_PREFIXES:
            self._homes.popitem(last=False)
