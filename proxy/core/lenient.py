"""JSON as strictly as possible and as leniently as needed: what an upstream may take must not fail here."""

from __future__ import annotations

import json
from typing import Any, Final

import orjson

TOO_DEEP: Final[dict[str, Any]] = {}


def parse_leniently(body: bytes) -> Any:
    """The document of a JSON text; ValueError where it is none.

    orjson first; what it refuses though others take it (NaN, lone surrogates, huge integers) by the standard library. A
    document too deep for both stands as an empty object: its sender's bytes pass, and nothing is read from them.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(body.decode("utf-8"), parse_int=_small_int)
    except RecursionError:
        return TOO_DEEP


def sayable(name: str) -> str:
    """A name out of such a document as strict JSON can carry it: without lone surrogates."""
    return name.encode("utf-8", "backslashreplace").decode()


def _small_int(digits: str) -> int | float:
    return int(digits) if len(digits.removeprefix("-")) < 20 else float("inf")
