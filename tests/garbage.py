"""What only the garbage collector can free: reference cycles."""

from __future__ import annotations

import gc
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import proxy

PACKAGE = str(Path(proxy.__file__).parent)


@contextmanager
def uncollected(found: Counter[str], *, ours: bool = False) -> Iterator[None]:
    """Counts, by type, what is made inside and only the collector could free. ours: only what is the proxy's."""
    gc.collect()
    gc.disable()
    try:
        yield
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found.update(_name(one) for one in gc.garbage if not ours or _is_ours(one))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def _name(one: object) -> str:
    code = _code(one)
    return f"{type(one).__module__}.{type(one).__qualname__}" + (f" {code.co_name}" if code is not None else "")


def _is_ours(one: object) -> bool:
    code = _code(one)
    if code is not None:
        return code.co_filename.startswith(PACKAGE)
    return type(one).__module__.partition(".")[0] == "proxy"


def _code(one: object) -> types.CodeType | None:
    """The code that something runs or ran."""
    match one:
        case types.FrameType():
            return one.f_code
        case types.TracebackType():
            return one.tb_frame.f_code
        case types.CoroutineType():
            return one.cr_code
        case types.AsyncGeneratorType():
            return one.ag_code
        case types.FunctionType():
            return one.__code__
    return None
