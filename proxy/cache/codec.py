"""Entries to bytes and back, for stores outside this process: with a version and a checksum, without pickle.

    frame   magic, version, packing, length of the head, checksum over everything else
    head    msgpack: the entry without body and request, so that a store can list entries without reading bodies
    body    as it is, or one zstd frame; if the request is kept, its length and text come before the body

Bytes that were cut, changed, swapped, or written by another program or version decode to None, which is a miss.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from typing import Final

import msgspec

from .entry import Entry

if sys.version_info >= (3, 14):  # pragma: no cover - the standard library's, which backports.zstd is a copy of
    from compression import zstd
else:
    from backports import zstd

VERSION: Final = 1
"""Part of every frame. It is raised if new code must not read an old entry, or the reverse."""

COMPRESS_FROM: Final = 1024
"""Shorter bodies (in bytes) are not compressed, since they would gain next to nothing."""

MAX_BODY: Final = 256 * 1024 * 1024
"""Most bytes to which a body is decompressed."""

_LEVEL: Final = 3
_MAGIC: Final = b"OCPe"
_PLAIN, _ZSTD, _WITH_REQUEST = 0, 1, 2  # flags; _WITH_REQUEST is added to one of the others
_LENGTH: Final = struct.Struct(">I")
_FRAME: Final = struct.Struct(">4sBBI16s")
FRAME_SIZE: Final = _FRAME.size

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Entry)


def encode(entry: Entry) -> tuple[bytes, bytes]:
    """Return (frame and head, packed body), for stores that keep the two apart. Joined they are one blob."""
    head = _encoder.encode(msgspec.structs.replace(entry, body=b"", request=None))
    body, packing = entry.body, _PLAIN
    if entry.request is not None:
        request = entry.request.encode()
        body, packing = _LENGTH.pack(len(request)) + request + body, _WITH_REQUEST
    if len(body) >= COMPRESS_FROM:
        packed = zstd.compress(body, _LEVEL)
        if len(packed) < len(body):
            body, packing = packed, packing | _ZSTD
    return _FRAME.pack(_MAGIC, VERSION, packing, len(head), _checksum(packing, head, body)) + head, body


def decode(blob: bytes, key: str, form: str) -> Entry | None:
    """Return the entry in `blob` if it is undamaged and names this key and form; else None. Never raises."""
    frame = _frame(blob)
    if frame is None:
        return None
    packing, head_end, checksum = frame
    view = memoryview(blob)
    head, packed = view[FRAME_SIZE:head_end], view[head_end:]
    if len(head) != head_end - FRAME_SIZE or _checksum(packing, head, packed) != checksum:
        return None
    entry = _entry(head)
    if entry is None or entry.key != key or entry.form != form:
        return None
    body = _unpack(packed) if packing & _ZSTD else bytes(packed)
    if body is None or not packing & _WITH_REQUEST:
        return None if body is None else msgspec.structs.replace(entry, body=body)
    try:
        end = _LENGTH.size + _LENGTH.unpack_from(body)[0]
        return msgspec.structs.replace(entry, body=body[end:], request=body[_LENGTH.size : end].decode())
    except (struct.error, UnicodeDecodeError):
        return None


def describe(start: bytes) -> Entry | None:
    """Return the entry without body and request, from a blob or a beginning with its whole head. Checks no checksum."""
    frame = _frame(start)
    return None if frame is None or len(start) < frame[1] else _entry(memoryview(start)[FRAME_SIZE : frame[1]])


def head_size(start: bytes) -> int | None:
    """Return how many bytes of a blob `describe` needs; None if it is no entry. The first FRAME_SIZE bytes suffice."""
    frame = _frame(start)
    return None if frame is None else frame[1]


def _frame(blob: bytes) -> tuple[int, int, bytes] | None:
    """Return (packing, end of the head, checksum); None if it is no frame of this version."""
    if len(blob) < FRAME_SIZE:
        return None
    magic, version, packing, length, checksum = _FRAME.unpack_from(blob)
    if magic != _MAGIC or version != VERSION or packing > _ZSTD | _WITH_REQUEST:
        return None
    return packing, FRAME_SIZE + length, checksum


def _entry(head: memoryview) -> Entry | None:
    try:
        return _decoder.decode(head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _unpack(packed: memoryview) -> bytes | None:
    """Return the content of exactly one complete zstd frame that states its length; None for anything else."""
    try:
        size = zstd.get_frame_info(packed).decompressed_size
        if size is None or size > MAX_BODY:
            return None
        unpacker = zstd.ZstdDecompressor()
        body = unpacker.decompress(packed)
    except zstd.ZstdError:
        return None
    return body if unpacker.eof and not unpacker.unused_data and len(body) == size else None


def _checksum(packing: int, head: bytes | memoryview, body: bytes | memoryview) -> bytes:
    """Return a checksum against damage. It does not stop forgery: whoever can write to the store can compute it."""
    digest = hashlib.sha256(b"%d %d %d\n" % (VERSION, packing, len(head)))
    digest.update(head)
    digest.update(body)
    return digest.digest()[:16]
