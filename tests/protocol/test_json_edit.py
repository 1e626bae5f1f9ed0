"""proxy.protocol.json_edit: one field changes, every other byte stays."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.json_edit import set_field, want_usage

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
names = text | st.sampled_from(["model", "stream", "stream_options", "a", "é", "x\\", '"', "{", "]"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(names, values, max_size=6)


def spelled(value: Any, generator: random.Random) -> str:
    """The value with random white space and escapes."""
    space = generator.choice(["", "", " ", "\n\t", "\r\n "])
    out = json.dumps(
        value,
        ensure_ascii=generator.random() < 0.5,
        separators=(f"{space},{space}", f"{space}:{space}"),
        indent=generator.choice([None, None, 1]),
    )
    return space + out + space


def padded(old: str, new: str) -> str:
    """`new` with the white space round `old`."""
    return old[: len(old) - len(old.lstrip())] + new + old[len(old.rstrip()) :]


class TestSetField:
    @pytest.mark.parametrize(
        ("raw", "expected"),
        [
            (b"{}", b'{"model":"new"}'),
            (b" { } ", b' {"model":"new" } '),
            (b'{"a":1}', b'{"a":1,"model":"new"}'),
            (b'{"a":1 \n}\n', b'{"a":1,"model":"new" \n}\n'),
            (b'{"a":{}}', b'{"a":{},"model":"new"}'),
            (b'{"a":"{"}', b'{"a":"{","model":"new"}'),
            (b'{"model":"old"}', b'{"model":"new"}'),
            (b'{"model" : "old" , "a":1}', b'{"model" : "new" , "a":1}'),
            (b'{"model":1}', b'{"model":"new"}'),
            (b'{"model":null,"a":1}', b'{"model":"new","a":1}'),
            (b'{"model":{"a":["}"]} }', b'{"model":"new" }'),
            (b'{"model":["]",[]],"z":0}', b'{"model":"new","z":0}'),
            (b'{"m\\u006fdel":"old"}', b'{"m\\u006fdel":"new"}'),
            (b'{"a":{"model":"old"}}', b'{"a":{"model":"old"},"model":"new"}'),
            (b'{"a":"\\"model\\":1"}', b'{"a":"\\"model\\":1","model":"new"}'),
            (b'{"model":"one","model":"two"}', b'{"model":"one","model":"new"}'),
            ('{"é":"😀","model":"ü"}'.encode(), '{"é":"😀","model":"new"}'.encode()),
            (b'{"a":NaN,"model":-1.5e+3}', b'{"a":NaN,"model":"new"}'),
        ],
    )
    def test_in_place(self, raw: bytes, expected: bytes) -> None:
        assert set_field(raw, "model", b'"new"') == expected

    @given(objects, names, values, st.randoms(use_true_random=False))
    def test_only_that_field_changes(
        self, document: dict[str, Any], name: str, value: Any, generator: random.Random
    ) -> None:
        before, members, after = spelled({}, generator)[:-1], [], spelled("", generator).replace('""', "}")
        before = before[: before.index("{") + 1]
        for member, old in document.items():
            key = spelled(member, generator) + ":"
            members.append((member, key, spelled(old, generator)))
        new = json.dumps(value)
        raw = before + ",".join(key + old for _, key, old in members) + after
        changed = [key + (padded(old, new) if member == name else old) for member, key, old in members]
        result = set_field(raw.encode(), name, new.encode())
        assert json.loads(result) == {**document, name: value}
        if name in document:
            assert result.decode() == before + ",".join(changed) + after
        else:
            inserted = f"{',' if members else ''}{json.dumps(name)}:{new}"
            head = raw[: raw.rindex("}")].rstrip()
            assert result.decode() == head + inserted + raw[len(head) :]

    @given(objects, st.randoms(use_true_random=False))
    def test_setting_what_is_there(self, document: dict[str, Any], generator: random.Random) -> None:
        document["model"] = "m"
        raw = spelled(document, generator).encode()
        assert set_field(raw, "model", b'"m"') == raw

    def test_depth_and_numbers_do_not_matter(self) -> None:
        deep = b"[" * 100_000 + b"]" * 100_000
        raw = b'{"a":' + deep + b',"b":' + b"1" * 100_000 + b',"model":"old"}'
        assert set_field(raw, "model", b'"new"') == raw.replace(b"old", b"new")

    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"1",
            b"[]",
            b"{",
            b'{"a"',
            b'{"a":',
            b'{"a":}',
            b'{"a":1',
            b'{"a":[',
            b'{"a":1 2}',
            b"{1:2}",
            b"}",
            b'{"a":"',
            b'{"a":1,}',
        ],
    )
    def test_not_an_object(self, raw: bytes) -> None:
        with pytest.raises(ValueError):
            set_field(raw, "model", b"1")


def wanted(raw: bytes) -> bytes | None:
    return want_usage(raw, json.loads(raw))


class TestWantUsage:
    @pytest.mark.parametrize(
        ("raw", "expected"),
        [
            (b'{"stream":true}', b'{"stream":true,"stream_options":{"include_usage":true}}'),
            (b'{"stream": true }\n', b'{"stream": true,"stream_options":{"include_usage":true} }\n'),
            (
                b'{"stream_options":null,"stream":true}',
                b'{"stream_options":{"include_usage":true},"stream":true}',
            ),
            (
                b'{"stream_options":{},"stream":true}',
                b'{"stream_options":{"include_usage":true},"stream":true}',
            ),
            (
                b'{"stream":true,"stream_options" : { "include_obfuscation" : false } }',
                b'{"stream":true,"stream_options" : { "include_obfuscation" : false,"include_usage":true } }',
            ),
            (
                b'{"a":{"stream_options":{}},"stream":true}',
                b'{"a":{"stream_options":{}},"stream":true,"stream_options":{"include_usage":true}}',
            ),
        ],
    )
    def test_usage_is_asked_for_if_left_open(self, raw: bytes, expected: bytes) -> None:
        assert wanted(raw) == expected

    @pytest.mark.parametrize(
        "raw",
        [
            b"{}",
            b'{"stream":false}',
            b'{"stream":null}',
            b'{"stream":1}',
            b'{"stream":"true"}',
            b'{"stream":true,"stream_options":{"include_usage":true}}',
            b'{"stream":true,"stream_options":{"include_usage":false}}',
            b'{"stream":true,"stream_options":{"include_usage":null}}',
            b'{"stream":true,"stream_options":{"include_\\u0075sage":false}}',
            b'{"stream":true,"stream_options":[]}',
            b'{"stream":true,"stream_options":true}',
            b'{"stream":true,"stream_options":{"include_usage":false},"stream_options":{}}',
            b'{"stream":true,"stream_options":{},"stream_options":null}',
            b'{"stream":true,"stream_options":null,"stream_options":{}}',
        ],
    )
    def test_usage_is_not_asked_for_otherwise(self, raw: bytes) -> None:
        assert wanted(raw) is None

    def test_not_an_object(self) -> None:
        with pytest.raises(ValueError):
            want_usage(b"[1]", {"stream": True})

    @given(objects, st.none() | st.dictionaries(text, values, max_size=3), st.randoms(use_true_random=False))
    def test_only_include_usage_changes(
        self, document: dict[str, Any], options: dict[str, Any] | None, generator: random.Random
    ) -> None:
        document = {**document, "stream": True, "stream_options": options}
        result = wanted(spelled(document, generator).encode())
        assert result is not None
        assert json.loads(result) == {
            **document,
            "stream_options": {**(options or {}), "include_usage": True},
        }
