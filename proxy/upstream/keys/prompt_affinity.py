"""Which key last served a prompt prefix, so that the upstream's prompt cache is used (`docs/keys-and-limits.md`)."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Final

import orjson

PREFIX_BYTES: Final = 4096
"""Bytes of a prefix: OpenAI caches prompts from 1,024 tokens, at about 4 bytes a token."""

TTL: Final = 3600.0
"""Seconds for which a key is remembered: OpenAI drops a cached prompt within an hour of its last use
(https://platform.openai.com/docs/guides/prompt-caching)."""

MAX_PREFIXES: Final = 20_000

_PROMPT_FIELDS: Final = ("instructions", "tools", "functions", "messages", "input", "prompt")
"""The fields of a prompt, in the order in which a model reads them."""

_CACHING_ENDPOINTS: Final = frozenset({"chat", "completions", "responses"})


def prefix_of(endpoint: str, document: Mapping[str, Any], model: str) -> bytes:
    """Return a digest of what decides where a prompt is cached; b"" if the upstream would not cache it.

    That is `prompt_cache_key`, else the first `PREFIX_BYTES` bytes. Short prompts and some endpoints are not cached.
    """
    if endpoint not in _CACHING_ENDPOINTS:
        return b""
    digest = hashlib.sha256(orjson.dumps([endpoint, model[:256]]) if _encodable(model) else b"")
    size = 0
    pieces = []
    for piece in _pieces(document):
        pieces.append(piece[: PREFIX_BYTES - size])
        size += len(pieces[-1])
        if size >= PREFIX_BYTES:
            break
    if size < PREFIX_BYTES:
        return b""
    named = document.get("prompt_cache_key")
    if isinstance(named, str) and named:
        digest.update(b"named" + named.encode("utf-8", "surrogatepass"))
    else:
        digest.update(b"".join(pieces))
    return digest.digest()


def _pieces(document: Mapping[str, Any]) -> Iterator[bytes]:
    for name in _PROMPT_FIELDS:
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
    """The key that last served each prefix. `now` is monotonic seconds."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, tuple[str, float]] = OrderedDict()

    def key_of(self, prefix: bytes, now: float) -> str | None:
        """Return the label of the key; None if it is not known or was too long ago."""
        found = self._keys.get(prefix)
        return found[0] if found is not None and now - found[1] < TTL else None

    def record(self, prefix: bytes, label: str, now: float) -> None:
        self._keys[prefix] = (label, now)
        self._keys.move_to_end(prefix)
        if len(self._keys) > MAX_PREFIXES:
            self._keys.popitem(last=False)
