"""Parses JSON strictly if possible, else leniently: a body that an upstream may accept must not fail here."""

from __future__ import annotations

import json
import re
from itertools import accumulate
from typing import Any, Final

import orjson

MAX_DEPTH: Final = 64
"""The most nested containers, the outermost included, of a document that orjson refuses."""

TOO_DEEP: Final[dict[str, Any]] = {}

_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NO_BRACKETS: Final = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEPS: Final = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # +1 and -1 as signed bytes


def parse_leniently(body: bytes) -> Any:
    """Return the document of a JSON text. Raises ValueError if it is no JSON.

    orjson refuses some texts that other parsers accept (NaN, lone surrogates, huge integers); the standard library
    reads those. Its limit of depth differs between versions of Python, so such a document deeper than `MAX_DEPTH`, and
    any that is too deep for orjson, becomes an empty object: its bytes are forwarded, and nothing is read from them.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    text = body.decode("utf-8")
    return TOO_DEEP if is_deeper(body) else json.loads(text, parse_int=_small_int)


def is_deeper(text: bytes, limit: int = MAX_DEPTH) -> bool:
    """Return whether a JSON text is nested deeper than `limit`. Does not recurse and does not validate the text."""
    if text.count(b"[") + text.count(b"{") <= limit:
        return False
    steps = _STRING.sub(b"", text).translate(_STEPS, _NO_BRACKETS)
    return max(accumulate(memoryview(steps).cast("b")), default=0) > limit


def printable_name(name: str) -> str:
    """Return a name from such a document as strict JSON can hold it: without lone surrogates."""
    return name.encode("utf-8", "backslashreplace").decode()


def _small_int(digits: str) -> int | float:
    return int(digits) if len(digits.removeprefix("-")) < 20 else float("inf")
