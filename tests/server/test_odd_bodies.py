"""Any request body is forwarded or refused; none makes the proxy fail."""

from __future__ import annotations

import random

import orjson
import pytest

from tests.pipeline.fixture import ask
from tests.pipeline.script import says
from tests.server.kit import running_proxy

pytestmark = pytest.mark.slow

TARGETS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/moderations", "/v1/responses"]
PIECES = [b"NaN", b"-Infinity", b"1e999", b"-0", b"1" * 5000, b"9" * 400 + b".5", b'"\\ud800"', b'"\\udc00\\ud83d"']
PIECES += [b'"\xf0\x9f\x98\x80"', b'"\\u0000"', b"[" * 70 + b"]" * 70, b"[" * 20_000 + b"]" * 20_000, b'{"a":1,"a":2}']
PIECES += [b"null", b"true", b'""', b"[]", b"{}", b"[{}]", b"[null]", b'[{"type":"namespace","tools":[{}]}]', b'"\xff"']
PIECES += [b'{"tools":' * 300 + b"1" + b"}" * 300, b'[{"tools":' * 300 + b"1" + b"}]" * 300, b"tru", b"1,", b"'x'"]
NAMES = ["model", "messages", "input", "prompt", "stream", "n", "temperature", "seed", "tools", "modalities", "store"]
NAMES += ["stream_options", "metadata", "user", "max_tokens", "odd name\\r\\n", "é", "", "\\ud800", "sample", "x" * 70]


ENDS = [(200, None), (400, "invalid_json"), (429, "request_exceeds_limit")]
"""200: forwarded; 400: not JSON; 429: more tokens than the limit."""


def bodies(count: int) -> list[bytes]:
    """Generate objects with odd names and values, some cut or damaged in one place."""
    generator = random.Random(3)
    found = []
    for _ in range(count):
        members = [
            f'"{generator.choice(NAMES)}":'.encode() + generator.choice(PIECES) for _ in range(generator.randrange(5))
        ]
        body = b"{" + b",".join(members) + b"}"
        at = generator.randrange(len(body) + 1)
        if generator.random() < 0.2:
            body = body[:at] + generator.choice([b"", b"\x00", b"\xff", b'"', b"}"]) + body[at + 1 :]
        found.append(body)
    return found


@pytest.mark.parametrize("target", TARGETS)
async def test_no_body_leads_to_a_500(target: str) -> None:
    odd = [body for body in bodies(150) if b'"stream":true' not in body]
    async with running_proxy(*(says() for _ in range(2 * len(odd)))) as server:
        for body in odd:
            for _ in range(2):
                answer = await server.ask("POST", target, body)
                assert (answer.status, answer.error) in ENDS, body[:200]
                assert answer.error or answer.get("X-Proxy-Cache") == "hit" or answer.get("X-Proxy-Cache-Reason")


async def test_any_field_name_fits_in_a_reason() -> None:
    names: list[str] = ["a b", "é", "x:y\r\nEvil: 1", "sample", "", "😀", '"', "\x00"]
    async with running_proxy(*(says() for _ in range(len(names) + 1))) as server:
        await server.ask(body=ask())
        for name in names:
            answer = await server.ask(body=orjson.dumps(ask() | {name: 1}))
            assert answer.status == 200
            reason = answer.get("X-Proxy-Cache-Reason")
            assert reason is not None
            assert reason.startswith("differs: ")
            assert answer.get("Evil") is None
