"""Stored responses as text, one line of JSON for each entry: the format of exports, imports and cassettes.

    {"cassette": 1, "key": …, "form": …, … , "request": …, "body": …}

The lines of a file are sorted by key, then form; their members have one order, and each line has its version. So the
same entries are the same bytes, and a diff shows real changes only. A body is text (`body`), or base64 if it is not
UTF-8 (`body_base64`); either way it is restored byte for byte. All other members are the fields of `Entry`. A field
that has its default is left out, so a new field with a default changes no existing line.

A file may be committed: no header in it belongs to one request, one key or one credential.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

import msgspec
import orjson

from ..cost.usage import Usage
from ..protocol.headers import Raw, downstream_headers, storable_headers
from .entry import Entry

VERSION: Final = 1
"""The member `cassette` of every line. It is raised if an old line would be misread."""

EntryName = tuple[str, str]

_DEFAULTS: Final = {field.name: field.default for field in msgspec.structs.fields(Entry)}
_CREDENTIALS: Final = frozenset({b"authorization", b"api-key", b"x-api-key", b"cookie", b"www-authenticate"})
_TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")  # RFC 9110 section 5.6.2
_AMOUNT: Final = r"\d{1,12}(\.\d{1,40})?"
_LINE_BREAKS: Final = re.compile(rb"[\r\n\0]")


class CassetteLineError(ValueError):
    """A line is no entry. The message says why and, for a file, where."""


def name_of(entry: Entry) -> EntryName:
    """Return what a file is sorted by; each occurs in it once."""
    return entry.key, entry.form


def shareable_headers(headers: Iterable[Raw]) -> tuple[Raw, ...]:
    """Return the headers that may be written: those of a hit, without those that name an account."""
    kept = storable_headers(downstream_headers(tuple(headers), pooled=True, decoded=True))
    return tuple(pair for pair in kept if pair[0].lower() not in _CREDENTIALS)


def write_line(entry: Entry) -> bytes:
    """Return the line, with its line feed. Raises ValueError for an entry that JSON cannot hold."""
    if not (math.isfinite(entry.stored_at) and math.isfinite(entry.ttl)):
        raise ValueError("stored_at and ttl must be numbers")
    fields: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(entry, headers=(), body=b""))
    del fields["body"]
    line = {name: value for name, value in fields.items() if value != _DEFAULTS[name]}
    # Here, between `status` and `usage_span`.
    line["headers"] = [[part.decode("latin-1") for part in pair] for pair in shareable_headers(entry.headers)]
    try:
        line["body"] = entry.body.decode()
    except UnicodeDecodeError:
        line["body_base64"] = base64.b64encode(entry.body).decode()
    try:
        return orjson.dumps({"cassette": VERSION} | line, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError as error:  # a lone surrogate
        raise ValueError(str(error)) from None


def write(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Return the lines of a file."""
    return map(write_line, sorted(entries, key=name_of))


def read_line(line: bytes) -> Entry:
    """Return the entry in a line. Raises CassetteLineError, whose message never repeats the line's contents."""
    try:
        members = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise CassetteLineError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(members, dict):
        raise CassetteLineError("not an entry: expected a JSON object")
    version = members.pop("cassette", None)
    if version != VERSION or type(version) is not int:
        found = "none" if version is None else version if type(version) is int else "something else"
        raise CassetteLineError(f"expected an entry of cassette version {VERSION}, found {found}")
    body = _body(members)
    headers = _headers(members.pop("headers", None))
    if unknown := sorted(members.keys() - _DEFAULTS.keys()):
        raise CassetteLineError(f"unknown member {unknown[0][:40]!r}: was it written by a newer version?")
    try:
        entry = msgspec.convert(members | {"headers": headers, "body": body}, Entry)
    except msgspec.ValidationError as error:
        raise CassetteLineError(str(error)) from None
    _check(entry)
    return entry


def read(file: str, lines: Iterable[bytes]) -> Iterator[Entry]:
    """Yield the entries of a file, in its order; skips empty lines. Raises CassetteLineError: `file:line: why`."""
    seen: dict[EntryName, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = read_line(line)
            first = seen.setdefault(name_of(entry), number)
            if first != number:
                raise CassetteLineError(f"the same key and form as line {first}")
        except CassetteLineError as error:
            raise CassetteLineError(f"{file}:{number}: {error}") from None
        yield entry


def _body(members: dict[str, Any]) -> bytes:
    given = [name for name in ("body", "body_base64") if name in members]
    if len(given) != 1:
        raise CassetteLineError("expected one of `body` and `body_base64`")
    text = members.pop(given[0])
    if not isinstance(text, str):
        raise CassetteLineError(f"`{given[0]}`: expected a text")
    if given[0] == "body":
        return text.encode()
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise CassetteLineError("`body_base64`: expected base64") from None


def _headers(pairs: object) -> tuple[Raw, ...]:
    """Return a line's headers. Hits send them, so they must be ones that an upstream could have sent."""
    if not isinstance(pairs, list):
        raise CassetteLineError("`headers`: expected a list of [name, value]")
    found = []
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise CassetteLineError("`headers`: expected a list of [name, value]")
        try:
            name, value = pair[0].encode("latin-1"), pair[1].encode("latin-1")
        except UnicodeEncodeError:
            raise CassetteLineError("`headers`: expected bytes as Latin-1") from None
        if not _TOKEN.match(name) or _LINE_BREAKS.search(value):
            raise CassetteLineError("`headers`: not a header")
        found.append((name, value))
    if shareable_headers(found) != tuple(found):
        raise CassetteLineError(
            "`headers`: has one that no stored answer has (of one request, a connection or a credential)"
        )
    return tuple(found)


def _check(entry: Entry) -> None:
    """Check what the types do not. Raises CassetteLineError."""
    if not 200 <= entry.status <= 599:
        raise CassetteLineError("`status`: expected 200 to 599")
    if not (math.isfinite(entry.stored_at) and math.isfinite(entry.ttl)):
        raise CassetteLineError("`stored_at`, `ttl`: expected numbers")
    if entry.usage_span is not None:
        start, end = entry.usage_span
        if not 0 <= start <= end <= len(entry.body):
            raise CassetteLineError("`usage_span`: outside the body")
    if entry.usage is not None and not _are_counts(entry.usage):
        raise CassetteLineError("`usage`: expected counts")
    if entry.cost is not None and not re.fullmatch(_AMOUNT, entry.cost, re.ASCII):
        raise CassetteLineError("`cost`: expected a plain decimal of USD")


def _are_counts(usage: Usage) -> bool:
    """Return whether all counts are at least 0 and a stated cost is a plain decimal."""
    counts = msgspec.structs.asdict(usage)
    stated = counts.pop("stated_cost")
    return min(counts.values()) >= 0 and (not stated or re.fullmatch(_AMOUNT, stated, re.ASCII) is not None)
