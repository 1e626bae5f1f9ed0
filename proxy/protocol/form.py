"""The fields of a multipart form that stand before its first file (RFC 7578)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_BOUNDARY: Final = re.compile(r'multipart/form-data\s*;.*?boundary="?([^";,\s]{1,70})"?', re.IGNORECASE)
_DISPOSITION: Final = re.compile(rb"content-disposition:([^\r\n]*)", re.IGNORECASE)
_NAME: Final = re.compile(rb'[;\s]name\s*=\s*"?([^";\r\n]*)"?', re.IGNORECASE)
_FILE: Final = re.compile(rb"[;\s]filename\*?\s*=", re.IGNORECASE)
_MODEL: Final = re.compile(
    rb"content-disposition:[^\r\n]{0,256}?[;\s]name\*?\s*=\s*[^;\r\n]{0,32}?model", re.IGNORECASE
)
_OVERLAP: Final = 512


@dataclass(frozen=True, slots=True)
class FormModel:
    """The fields `model` in the beginning of a form.

    spans: where their values begin and end. done: what follows is a file, or the end of the form.
    """

    spans: tuple[tuple[int, int], ...]
    done: bool


def boundary_of(content_type: str) -> bytes:
    """Return the boundary of a form; b"" if it is none."""
    found = _BOUNDARY.match(content_type)
    return found[1].encode("latin-1", "replace") if found is not None else b""


def find_model(head: bytes, boundary: bytes) -> FormModel:
    """Return where the beginning of a form names a model."""
    delimiter = b"--" + boundary
    spans: list[tuple[int, int]] = []
    at = head.find(delimiter)
    while at >= 0:
        at += len(delimiter)
        start = head.find(b"\r\n\r\n", at)
        if head.startswith(b"--", at):
            return FormModel(tuple(spans), True)
        if start < 0:
            break
        found = _DISPOSITION.search(head, at, start)
        if found is None or _FILE.search(found[1]):
            return FormModel(tuple(spans), True)
        end = head.find(b"\r\n" + delimiter, start + 4)
        if end < 0:
            break
        name = _NAME.search(found[1])
        if name is not None and name[1].lower() == b"model":
            spans.append((start + 4, end))
        at = end + 2
    return FormModel(tuple(spans), False)


def with_model(head: bytes, boundary: bytes, spans: tuple[tuple[int, int], ...], model: bytes) -> bytes:
    """Return the beginning of a form with another `model`, which becomes its first field if there is none."""
    if not spans:
        return b'--%b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n%b' % (boundary, model, head)
    start, end = spans[-1]
    return head[:start] + model + head[end:]


class LaterModel:
    """Looks for another field `model` in the rest of a form, without keeping it."""

    def __init__(self) -> None:
        self._tail = b""

    def found_in(self, piece: bytes) -> bool:
        """Return whether the form, with this next piece of it, names a model."""
        text = self._tail + piece
        self._tail = text[-_OVERLAP:]
        return _MODEL.search(text) is not None
