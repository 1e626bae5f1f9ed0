"""Every kind of client with every kind of upstream: path, credential, model in the body (docs/clients.md)."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy.config.secret import Secret
from proxy.config.settings import KeySettings, UpstreamSettings
from tests.pipeline.clock import virtual_time
from tests.pipeline.fixture import PipelineFixture, ask, pool, settings
from tests.pipeline.script import says

ROOT = "https://res.test"
AZURE = UpstreamSettings(
    "azure",
    kind="azure",
    base_url=ROOT,
    api_version="2024-10-21",
    deployments={"gpt-4o": "my-gpt4o"},
    keys=(KeySettings("az", Secret("sk-az"), quota="az"),),
)
AZURE_V1 = UpstreamSettings("azure", "azure", ROOT, deployments={"gpt-4o": "my-gpt4o"}, keys=AZURE.keys)
CHAT, DEPLOYED = "/v1/chat/completions", "/openai/deployments/d1/chat/completions?api-version=2024-06-01"
WITHOUT_MODEL = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("upstream", "target", "document", "url", "model"),
    [
        (pool("k1"), CHAT, ask(), "http://up.test/v1/chat/completions", "gpt-4o"),
        (pool("k1"), DEPLOYED, ask(), "http://up.test/v1/chat/completions", "gpt-4o"),
        (pool("k1"), DEPLOYED, WITHOUT_MODEL, "http://up.test/v1/chat/completions", "d1"),
        (pool("k1"), "/openai/v1/chat/completions", ask(), "http://up.test/v1/chat/completions", "gpt-4o"),
        (
            AZURE,
            CHAT,
            ask(),
            f"{ROOT}/openai/deployments/my-gpt4o/chat/completions?api-version=2024-10-21",
            "gpt-4o",
        ),
        (AZURE, DEPLOYED, ask(), f"{ROOT}{DEPLOYED}", "gpt-4o"),
        (AZURE, DEPLOYED, WITHOUT_MODEL, f"{ROOT}{DEPLOYED}", None),
        (AZURE_V1, CHAT, ask(), f"{ROOT}/openai/v1/chat/completions", "my-gpt4o"),
        (AZURE_V1, CHAT, ask(model="other"), f"{ROOT}/openai/v1/chat/completions", "other"),
    ],
)
@virtual_time
async def test_url_and_model_of_each_request_shape(
    upstream: UpstreamSettings, target: str, document: Any, url: str, model: str | None
) -> None:
    pipeline = PipelineFixture(says(), config=settings(upstream))
    body = orjson.dumps(document, option=orjson.OPT_INDENT_2)
    result = await pipeline.ask(document, target=target, body=body)
    [sent] = pipeline.transport.sent
    assert (result.status, sent.url, sent.json().get("model")) == (200, url, model)
    assert sent.headers.get("api-key") == ("sk-az" if upstream.kind == "azure" else None)
    if document.get("model") == model:
        assert sent.body == body  # byte for byte, unless the model must change
    elif "model" in document:
        assert sent.body == body.replace(b'"gpt-4o"', b'"my-gpt4o"')


@virtual_time
async def test_the_receipt_has_the_requested_model() -> None:
    pipeline = PipelineFixture(says(), config=settings(AZURE_V1))
    await pipeline.ask()
    assert pipeline.receipt.model == "gpt-4o"


@pytest.mark.parametrize("upstream", [pool("k1"), AZURE, AZURE_V1], ids=["openai", "azure", "azure v1"])
@pytest.mark.parametrize("name", ["", "\ud800", "a\nb", "a/../b", "ä" * 9, "%2e%2e"], ids=ascii)
@virtual_time
async def test_unusual_model_names_are_forwarded_or_refused(upstream: UpstreamSettings, name: str) -> None:
    """They reach the upstream as they are, or they are refused; they lead nowhere else and break nothing."""
    pipeline = PipelineFixture(says(), config=settings(upstream))
    document = ask(model=name)
    body = b'{"model":"\\ud800","messages":[]}' if name == "\ud800" else orjson.dumps(document)
    result = await pipeline.ask(document, body=body)
    assert result.status in (200, 400, 502)
    for sent in pipeline.transport.sent:
        assert sent.url.startswith((f"{ROOT}/openai/", "http://up.test/v1/chat/completions"))
        assert not {"..", ".", ""} & set(sent.url.partition("?")[0].split("/")[3:])
        assert sent.url.isascii()
    assert pipeline.receipt.model == name
    pipeline.assert_nothing_leaked(name)
