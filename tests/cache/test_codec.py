"""proxy.cache.codec: what was put in comes out, and nothing else ever does."""

from __future__ import annotations

import struct
import sys
from hashlib import sha256

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache import codec as envelope
from proxy.cache.codec import FRAME_SIZE, decode, describe, encode, head_size
from proxy.cache.entry import Entry
from proxy.cost.usage import Usage
from tests.cache.stores.kit import entry

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def blob(one: Entry) -> bytes:
    return b"".join(encode(one))


def forged(head: bytes, body: bytes, packing: int = 1, version: int = envelope.VERSION) -> bytes:
    """A blob with a right checksum over whatever it holds: what damage cannot make, but a foreign writer can."""
    digest = sha256(b"%d %d %d\n" % (version, packing, len(head)) + head + body).digest()[:16]
    return struct.pack(">4sBBI16s", b"OCPe", version, packing, len(head), digest) + head + body


def head_of(one: Entry) -> bytes:
    return msgspec.msgpack.encode(msgspec.structs.replace(one, body=b""))


texts = st.text(st.characters(codec="utf-8"), max_size=20)
counts = st.integers(0, 10**12)
entries = st.builds(
    Entry,
    key=texts,
    form=st.sampled_from(("json", "sse")),
    status=st.integers(100, 599),
    headers=st.lists(st.tuples(st.binary(max_size=9), st.binary(max_size=9)), max_size=3).map(tuple),
    body=st.binary(max_size=50) | st.binary(max_size=50).map(lambda part: part * 200),
    usage_span=st.none() | st.tuples(counts, counts),
    stored_at=st.floats(allow_nan=False),
    ttl=st.floats(allow_nan=False),
    endpoint=texts,
    model=texts,
    answer_model=st.none() | texts,
    usage=st.none() | st.builds(Usage, counts, counts, counts, counts, counts, counts),
    cost=st.none() | texts,
    namespace=texts,
    tags=st.lists(texts, max_size=3).map(tuple),
    sampled=st.booleans(),
    usage_asked=st.booleans(),
    request=st.none() | texts | texts.map(lambda text: text * 200),
    bare=texts,
)


@given(entries)
def test_decode_reverses_encode(one: Entry) -> None:
    whole = blob(one)
    assert decode(whole, one.key, one.form) == one
    assert describe(whole) == msgspec.structs.replace(one, body=b"", request=None)
    size = head_size(whole[:FRAME_SIZE])
    assert size is not None
    assert describe(whole[:size]) == describe(whole)
    assert describe(whole[: size - 1]) is None


def test_a_blob_of_another_key_or_form_is_a_miss() -> None:
    whole = blob(entry("a"))
    assert decode(whole, "b", "json") is None
    assert decode(whole, "a", "sse") is None
    assert decode(whole, "", "json") is None


@pytest.mark.parametrize("body", [b"short", b"long enough to be packed " * 100])
def test_any_flipped_bit_is_a_miss(body: bytes) -> None:
    whole = blob(entry("a", body))
    for at in range(len(whole)):
        for bit in (1, 128):
            damaged = bytearray(whole)
            damaged[at] ^= bit
            assert decode(bytes(damaged), "a", "json") is None, (at, bit)
        assert decode(whole[:at], "a", "json") is None, at
        describe(bytes(damaged))  # says what it can, and never raises
    assert decode(whole + b"\0", "a", "json") is None
    assert decode(whole + whole, "a", "json") is None


@given(st.binary(max_size=200))
def test_bytes_of_other_programs_are_misses(data: bytes) -> None:
    assert decode(data, "a", "json") is None
    assert describe(data) is None
    assert decode(b"OCPe\x01\x01" + data, "a", "json") is None


def test_other_versions_are_misses() -> None:
    head = head_of(entry("a"))
    assert decode(forged(head, b"", packing=0), "a", "json") is not None
    for version in (0, 2, 255):
        assert decode(forged(head, b"", packing=0, version=version), "a", "json") is None
        assert head_size(forged(head, b"", version=version)) is None


def test_bodies_are_compressed_only_if_smaller() -> None:
    assert len(encode(entry(body=b"x" * 1023))[1]) == 1023
    assert len(encode(entry(body=b"x" * 1024))[1]) < 100
    noise = b"".join(sha256(b"%d" % n).digest() for n in range(40))
    assert encode(entry(body=noise))[1] == noise
    assert decode(blob(entry(body=noise)), "k", "json") == entry(body=noise)


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"no frame",
        zstd.compress(b"x" * 2000) + zstd.compress(b"y" * 2000),
        zstd.compress(b"x" * 2000) + b"more",
        zstd.compress(b"x" * 2000)[:-1],
        zstd.ZstdCompressor(options={zstd.CompressionParameter.content_size_flag: 0}).compress(
            b"x" * 2000, zstd.ZstdCompressor.FLUSH_FRAME
        ),
    ],
    ids=["empty", "garbage", "two frames", "trailing", "cut", "size unknown"],
)
def test_invalid_zstd_frames_are_misses(packed: bytes) -> None:
    assert decode(forged(head_of(entry()), packed), "k", "json") is None


def test_bodies_that_decompress_beyond_the_limit_are_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "MAX_BODY", 10_000)
    fits, bomb = b"x" * 10_000, b"x" * 10_001
    assert decode(forged(head_of(entry()), zstd.compress(fits)), "k", "json") == entry(body=fits)
    assert decode(forged(head_of(entry()), zstd.compress(bomb)), "k", "json") is None


@pytest.mark.parametrize("head", [b"", b"\xc1", b"\x80", msgspec.msgpack.encode([1]), b"\x91" * 5000])
def test_invalid_heads_are_misses(head: bytes) -> None:
    assert decode(forged(head, b"", packing=0), "k", "json") is None
    assert describe(forged(head, b"", packing=0)) is None


def test_heads_with_wrong_types_are_misses() -> None:
    document = msgspec.msgpack.decode(head_of(entry()))
    for change in ({"status": "200"}, {"form": "xml"}, {"tags": 1}, {"headers": [["a", "b", "c"]]}):
        head = msgspec.msgpack.encode({**document, **change})
        assert decode(forged(head, b"", packing=0), "k", "json") is None


def test_a_stored_entry_stays_readable() -> None:
    """A blob written by the first release. Where this fails, old entries would be read wrongly: raise VERSION."""
    head = msgspec.msgpack.encode(
        {
            "key": "k", "form": "json", "status": 200, "headers": [[b"content-type", b"application/json"]],
            "body": b"", "usage_span": None, "stored_at": 1.0, "ttl": 2.0, "endpoint": "chat", "model": "m",
            "answer_model": None, "usage": None, "cost": None, "namespace": "", "tags": ["a:b"], "sampled": False,
        }
    )  # fmt: skip
    found = decode(forged(head, b"{}", packing=0, version=1), "k", "json")
    assert found is not None
    assert found.body == b"{}"
    assert found.tags == ("a:b",)
    assert not found.usage_asked


def test_a_stored_request_is_compressed_with_the_body() -> None:
    one = entry(body=b"[]", request='{"a": "' + "x" * 5000 + '"}')
    head, body = encode(one)
    assert len(head) < 600
    assert len(body) < 200
    assert decode(head + body, "k", "json") == one
    assert decode(blob(entry(body=b"[]", request="")), "k", "json") == entry(body=b"[]", request="")
    plain = head_of(entry("a"))
    for rest in (b"", b"\0\0\0", b"\0\0\0\1\xff"):
        assert decode(forged(plain, rest, packing=2), "a", "json") is None
    assert decode(forged(plain, b"", packing=4), "a", "json") is None
