"""JSON as strictly as possible and as leniently as needed: what an upstream may take must not fail here."""

from __future__ import annotations

import json
import re
from itertools import accumulate
from typing import Any, Final

import orjson

DEEPEST: Final = 64
"""Containers within containers, the outermost counted, that are still read where orjson cannot."""

TOO_DEEP: Final[dict[str, Any]] = {}

_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NO_BRACKETS: Final = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEPS: Final = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # +1 and -1 as signed bytes


def parse_leniently(body: bytes) -> Any:
    """The document of a JSON text; ValueError where it is none.

    orjson first; what it refuses though others take it (NaN, lone surrogates, huge integers) by the standard library,
    whose own limit of depth differs between versions of Python. Such a document deeper than DEEPEST, and any that is
    too deep for orjson, stands as an empty object: its sender's bytes pass, and nothing is read from them.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    text = body.decode("utf-8")
    return TOO_DEEP if is_deeper(body) else json.loads(text, parse_int=_small_int)


def is_deeper(text: bytes, limit: int = DEEPEST) -> bool:
    """Whether a JSON text is nested deeper than `limit`. Does not recurse, and does not check the text."""
    if text.count(b"[") + text.count(b"{") <= limit:
        return False
    steps = _STRING.sub(b"", text).translate(_STEPS, _NO_BRACKETS)
    return max(accumulate(memoryview(steps).cast("b")), default=0) > limit


def printable_name(name: str) -> str:
    """A name out of such a document as strict JSON can carry it: without lone surrogates."""
    return name.encode("utf-8", "backslashreplace").decode()


def _small_int(digits: str) -> int | float:
    return int(digits) if len(digits.removeprefix("-")) < 20 else float("inf")
