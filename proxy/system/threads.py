"""Work in a thread, so that the event loop stays free."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar, TypeVarTuple

LARGE: Final = 256 * 1024
"""Bytes from which parsing, hashing or converting would hold the event loop for longer than a thread costs."""

T = TypeVar("T")
Args = TypeVarTuple("Args")


async def in_thread_if_large(size: int, function: Callable[[*Args], T], *args: *Args) -> T:
    """Return `function(*args)`, called in a thread if it works on more than `LARGE` bytes. size: in bytes."""
    if size > LARGE:
        return await asyncio.to_thread(function, *args)
    return function(*args)
