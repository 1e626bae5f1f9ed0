"""proxy.cache.key: never one key for two requests, never two keys for one."""

from __future__ import annotations

import copy
import json
import random
import time
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from proxy.cache.fields import dropped_fields
from proxy.cache.key import KeyParts, NotCacheable, cache_key, canonical
from proxy.protocol.json_parse import MAX_DEPTH

IGNORED = ["user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"]
NONE: frozenset[str] = frozenset()

REQUEST: dict[str, Any] = {
    "model": "gpt-4o",
    "messages": [
        {"role": "system", "content": "Be brief. Sei präzise. 😀 \u2028"},
        {"role": "user", "content": [{"type": "text", "text": 'say "hi"\n\t\\'}, {"type": "image_url"}]},
    ],
    "temperature": 0,
    "top_p": 1.0,
    "n": 1,
    "logit_bias": {"50256": -100},
    "stop": None,
    "parallel_tool_calls": True,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "vendor_option": {"deep": [[1, 2], [], {"x": ""}]},
}


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
json_objects = st.dictionaries(text, json_values, max_size=5)


def key_of(document: Any) -> bytes:
    return canonical(json.dumps(document).encode(), NONE)


class TestDifferent:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("{}", '{"a":null}'),
            ('{"a":null}', '{"a":0}'),
            ('{"a":0}', '{"a":false}'),
            ('{"a":0}', '{"a":""}'),
            ('{"a":0}', '{"a":-0}'),
            ('{"a":0}', '{"a":0.0}'),
            ('{"a":0.0}', '{"a":-0.0}'),
            ('{"a":1}', '{"a":1.0}'),
            ('{"a":1.0}', '{"a":1e0}'),
            ('{"a":1}', '{"a":1e0}'),
            ('{"a":100}', '{"a":1e2}'),
            ('{"a":1}', '{"a":true}'),
            ('{"a":1}', '{"a":"1"}'),
            ('{"a":[1]}', '{"a":"[1]"}'),
            ('{"a":[]}', '{"a":{}}'),
            ('{"a":[1,2]}', '{"a":[2,1]}'),
            ('{"a":[[1],2]}', '{"a":[[1,2]]}'),
            ('{"a":9007199254740992}', '{"a":9007199254740993}'),
            ('{"a":18446744073709551616}', '{"a":18446744073709551617}'),
            ('{"a":1e400}', '{"a":1e401}'),
            ('{"a":0.1}', '{"a":0.10000000000000000001}'),
            ('{"a":"x"}', '{"a":"X"}'),
            ('{"a":"x"}', '{"a":"x "}'),
            ('{"a":"\\u00e9"}', '{"a":"e\\u0301"}'),
            ('{"a":"\\\\n"}', '{"a":"\\n"}'),
            ('{"a":{"b":1}}', '{"a":{},"b":1}'),
        ],
    )
    def test_different_requests_have_different_keys(self, one: str, other: str) -> None:
        assert canonical(one.encode(), NONE) != canonical(other.encode(), NONE)

    def test_any_single_mutation_changes_the_key(self) -> None:
        """Any value at any depth replaced, removed or added to: never the key of the original, nor of
        another.
        """
        original = key_of(REQUEST)
        generator = random.Random(2)
        seen: dict[bytes, str] = {original: json.dumps(REQUEST, sort_keys=True)}
        for _ in range(4000):
            document = copy.deepcopy(REQUEST)
            mutate(document, generator)
            text = json.dumps(document, sort_keys=True)
            key = key_of(document)
            assert key != original
            assert seen.setdefault(key, text) == text

    @given(numbers, numbers)
    def test_numbers_are_compared_by_spelling(self, one: float, other: float) -> None:
        assume(json.dumps(one) != json.dumps(other))
        assert key_of({"a": one}) != key_of({"a": other})


def mutate(document: dict[str, Any], generator: random.Random) -> None:
    places: list[tuple[Any, Any]] = []

    def walk(container: Any) -> None:
        for place in container if isinstance(container, dict) else range(len(container)):
            places.append((container, place))
            if isinstance(container[place], dict | list):
                walk(container[place])

    walk(document)
    container, place = generator.choice(places)
    before = container[place]
    kind = generator.randrange(4)
    if kind == 0:
        del container[place]
    elif kind == 1:
        name = f"field{generator.randrange(10**6)}"
        (container.update({name: None}) if isinstance(container, dict) else container.append(None))
    elif kind == 2 and isinstance(before, str):
        at = generator.randrange(len(before) + 1)
        container[place] = before[:at] + generator.choice('xé😀"\\ \n0') + before[at:]
    else:
        others = [None, True, False, 0, 1, 1.0, -1, 0.5, "", "1", "null", [], {}, [before], {"a": before}]
        container[place] = generator.choice([o for o in others if json.dumps(o) != json.dumps(before)])


def respell(value: Any, generator: random.Random) -> str:
    """Some other JSON text for the same value: key order, white space, escapes."""

    def space() -> str:
        return "".join(generator.choices([" ", "\n", "\t", "\r"], k=generator.choice([0, 0, 0, 1, 2])))

    if isinstance(value, dict):
        items = list(value.items())
        generator.shuffle(items)
        members = [respell(name, generator) + space() + ":" + respell(item, generator) for name, item in items]
        return space() + "{" + (space() + ",".join(members)) + "}" + space()
    if isinstance(value, list):
        return space() + "[" + space() + ",".join(respell(item, generator) for item in value) + "]" + space()
    if isinstance(value, str):
        return space() + '"' + "".join(respell_character(c, generator) for c in value) + '"' + space()
    return space() + json.dumps(value) + space()


def respell_character(character: str, generator: random.Random) -> str:
    units = character.encode("utf-16-be")
    escaped = "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
    upper = "\\u" + escaped[2:].upper() if len(units) == 2 else escaped
    choices = [escaped, upper, json.dumps(character)[1:-1]]
    if character == "/":
        choices.append("\\/")
    if character not in '"\\' and character >= " ":
        choices.append(character)
    return generator.choice(choices)


class TestSame:
    def test_respellings_of_known_requests_have_the_same_key(self) -> None:
        generator = random.Random(1)
        original = key_of(REQUEST)
        for _ in range(3000):
            assert canonical(respell(REQUEST, generator).encode(), NONE) == original

    @given(json_objects, st.randoms(use_true_random=False))
    def test_any_respelling_of_any_document_has_the_same_key(
        self, document: dict[str, Any], generator: random.Random
    ) -> None:
        assert canonical(respell(document, generator).encode(), NONE) == key_of(document)

    @given(json_objects)
    def test_the_canonical_form_means_the_same(self, document: dict[str, Any]) -> None:
        form = key_of(document)
        assert json.loads(form) == document
        assert canonical(form, NONE) == form

    def test_an_escaped_surrogate_pair_equals_the_character(self) -> None:
        assert canonical(b'{"a":"\\ud83d\\ude00"}', NONE) == canonical('{"a":"😀"}'.encode(), NONE)


class TestDrop:
    @pytest.mark.parametrize("endpoint", ["chat", "completions", "embeddings", "moderations"])
    def test_ignored_fields_are_not_in_the_key(self, endpoint: str) -> None:
        assert dropped_fields(endpoint, IGNORED) == {"stream", "stream_options", *IGNORED}

    def test_ignored_fields_of_responses_are_in_the_key(self) -> None:
        assert dropped_fields("responses", IGNORED) == {"stream", "stream_options"}

    def test_only_top_level_fields_are_ignored(self) -> None:
        drop = dropped_fields("chat", IGNORED)
        body = b'{"stream":true,"user":"u","metadata":{"a":1},"messages":[{"user":"v","stream":1}]}'
        assert canonical(body, drop) == b'{"messages":[{"stream":1,"user":"v"}]}'
        assert canonical(b'{"model":"m"}', drop) == b'{"model":"m"}'

    def test_an_escaped_field_name_is_ignored_too(self) -> None:
        assert canonical(b'{"str\\u0065am":true}', dropped_fields("chat", [])) == b"{}"


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


class TestNoKey:
    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            (b"[]", "not an object"),
            (b'"x"', "not an object"),
            (b"1", "not an object"),
            (b"null", "not an object"),
            (b'{"a":1,"a":1}', "duplicate keys"),
            (b'{"a":1,"\\u0061":1}', "duplicate keys"),
            (b'{"m":[{"x":{"a":1,"b":2,"a":3}}]}', "duplicate keys"),
            (b'{"user":{"a":1,"a":2}}', "duplicate keys"),
            (b'{"a":NaN}', "NaN"),
            (b'{"a":[Infinity]}', "NaN"),
            (b'{"a":-Infinity}', "NaN"),
            (b'{"a":"\\ud800"}', "unicode"),
            (b'{"a":"\\udc00\\ud800"}', "unicode"),
            (b'{"\\ud83d":1}', "unicode"),
            (nested(MAX_DEPTH + 1), "depth"),
            (b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "depth"),
            (nested(100_000), "depth"),
            (b'{"a":NaN,"b":' + nested(100_000) + b"}", "depth"),
            (b"[" * 100_000, "depth"),
            *((b'{"b":%b,"a":NaN}' % nested(depth), "depth") for depth in (MAX_DEPTH, 5000)),
            *((b'{"a":1,"a":%b}' % nested(depth), "depth") for depth in (MAX_DEPTH, 5000)),
            *((b'{"a":NaN,"b":%b}' % nested(depth), "depth") for depth in (MAX_DEPTH, 5000)),
            (b'{"a":NaN,"b":"' + b"[" * 5000 + b'"}', "NaN"),
            (b"[" * 5000, "depth"),
        ],
    )
    def test_bodies_without_a_key_and_their_reasons(self, body: bytes, reason: str) -> None:
        with pytest.raises(NotCacheable) as caught:
            canonical(body, frozenset({"user"}))
        assert caught.value.reason == reason

    def test_the_greatest_allowed_depth_has_a_key(self) -> None:
        assert canonical(nested(MAX_DEPTH), NONE) == nested(MAX_DEPTH)
        wide = b'{"a":[' + b",".join([b'{"b":[{}]}'] * 100) + b"]}"
        assert canonical(wide, NONE) == wide

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b'{"a":1}x',
            b"{'a':1}",
            b'{"a":01}',
            b'{"a":1,}',
            b'{"a":+1}',
            b'{"a":"\n"}',
            b'{"a":"\xff"}',
            b'{"a":"\xed\xa0\x80"}',
            b'\xef\xbb\xbf{"a":1}',
            '{"a":1}'.encode("utf-16"),
            b'{"a":NaN',
            b'{"a":1,"a":2',
            b'{"a":nan}',
        ],
    )
    def test_invalid_json_has_no_key(self, body: bytes) -> None:
        with pytest.raises(ValueError):
            canonical(body, NONE)

    @given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
    @example(b'{"a":1e99999999999999999999}')
    def test_any_bytes_give_a_key_or_the_documented_error(self, body: bytes) -> None:
        try:
            canonical(body, NONE)
        except (ValueError, NotCacheable):
            pass

    @given(st.lists(st.sampled_from([*list('{}[]:,"\\u0a1-.eNaInfty'), '"a":', "�", "\\ud83d"]), max_size=20))
    def test_almost_json_gives_a_key_or_the_documented_error(self, pieces: list[str]) -> None:
        try:
            canonical("".join(pieces).encode("utf-8", "surrogatepass"), NONE)
        except (ValueError, NotCacheable):
            pass

    def test_huge_numbers_are_never_converted(self) -> None:
        digits = b"1" * 1_000_000
        assert canonical(b'{"a":' + digits + b"}", NONE) == b'{"a":' + digits + b"}"
        assert canonical(b'{"a":1e9999999}', NONE) == b'{"a":1e9999999}'


PARTS = KeyParts("chat", "ns", "gpt-4o", "https://api.openai.com/v1", "", "", "", b'{"model":"gpt-4o"}')


SHORT_TEXTS = st.lists(st.text("1:a", max_size=3), min_size=7, max_size=7)


def key_with(parts: list[str]) -> str:
    endpoint, namespace, model, upstreams, beta, sample, query = parts
    return cache_key(KeyParts(endpoint, namespace, model, upstreams, beta, sample, query, body=b""))


class TestCacheKey:
    def test_the_key_is_hexadecimal(self) -> None:
        key = cache_key(PARTS)
        assert len(key) == 64
        assert key == cache_key(msgspec.structs.replace(PARTS))
        assert bytes.fromhex(key)

    @pytest.mark.parametrize("field", KeyParts.__struct_fields__)
    def test_every_part_is_in_the_key(self, field: str) -> None:
        other: Any = b"{}" if field == "body" else "other"
        assert cache_key(msgspec.structs.replace(PARTS, **{field: other})) != cache_key(PARTS)

    def test_the_format_version_is_in_the_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = cache_key(PARTS)
        monkeypatch.setattr("proxy.cache.key.FORMAT_VERSION", "next")
        assert cache_key(PARTS) != before

    @settings(max_examples=300)
    @given(SHORT_TEXTS, SHORT_TEXTS)
    def test_parts_are_separated_in_the_key(self, one: list[str], other: list[str]) -> None:
        assume(one != other)
        assert key_with(one) != key_with(other)

    def test_any_header_bytes_give_a_key(self) -> None:
        assert cache_key(msgspec.structs.replace(PARTS, beta="\udcff")) != cache_key(
            msgspec.structs.replace(PARTS, beta="\udcfe")
        )


def test_the_time_is_linear_in_the_size() -> None:
    """20 MB of text, of numbers and of small objects; generous, as this machine may be busy."""
    for body in (
        orjson.dumps({"messages": [{"role": "user", "content": "a [b] {c} é\n" * 1_000_000}]}),
        b'{"input":[' + b",".join([b"12345"] * 300_000) + b"]}",
        b'{"messages":[' + b",".join([b'{"role":"user","content":"hello"}'] * 50_000) + b"]}",
    ):
        start = time.process_time()
        canonical(body, NONE)
        assert time.process_time() - start < 5
