"""What an operator is told of a request: by the admin route, and by `openai-proxy cache explain` on the store."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.cli import main
from proxy.config.settings import CacheSettings, ClientKeySettings, ServerSettings
from proxy.protocol.options import Options
from tests.pipeline.clock import virtual_time
from tests.pipeline.fixture import PipelineFixture, ask, pool, settings
from tests.pipeline.script import says
from tests.server.kit import RunningProxy, running_proxy

FOREVER = 1e10
EXPLAIN = "/_proxy/cache/explain"


async def told(home: RunningProxy, document: Any, query: str = "", **more: Any) -> dict[str, Any]:
    answer = await home.ask("POST", EXPLAIN + query, document, **more)
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.slow
async def test_a_stored_request_is_explained_as_a_hit() -> None:
    async with running_proxy(says()) as home:
        assert (await told(home, ask()))["reason"] == "new"
        bought = await home.ask("POST", "/v1/chat/completions", ask())
        found = await told(home, ask(user="me", stream=True))
        assert (found["reason"], found["key"]) == ("hit", bought.get("X-Proxy-Cache-Key"))
        assert (found["left_out"], [card["form"] for card in found["stored"]]) == (["stream", "user"], ["json"])
        found = await told(home, ask(temperature=0.5), headers=[("X-Proxy-Sample", "1")])
        assert (found["reason"], found["differs"]) == ("differs: sample, temperature", ["sample", "temperature"])
        assert found["parts"]["sample"] == "1"
        assert found["nearest"]["key"] == bought.get("X-Proxy-Cache-Key")
        assert set(found["fields"]) == {"model", "upstreams", "sample", "messages", "temperature"}
        assert len(home.transport.sent) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("document", "headers", "reason"),
    [
        (ask(store=True), [], "uncacheable: store=true"),
        (ask(), [("Cache-Control", "no-store")], "no-store"),
        (ask(), [("Cache-Control", "no-cache")], "no-cache"),
    ],
)
async def test_the_reason_of_a_miss_is_given(document: Any, headers: list[tuple[str, str]], reason: str) -> None:
    async with running_proxy() as home:
        assert (await told(home, document, headers=headers))["reason"] == reason


@pytest.mark.slow
async def test_options_and_errors_of_the_target() -> None:
    async with running_proxy() as home:
        found = await told(home, {"input": "x"}, "?target=/_/namespace=ci/v1/embeddings%3Fa=1")
        assert (found["endpoint"], found["parts"]["namespace"], found["parts"]["query"]) == ("embeddings", "ci", "a=1")
        for query in ("?target=/v1/models", "?target=/nothing", "?client=nobody", "?what=1"):
            assert (await home.ask("POST", EXPLAIN + query, ask())).status in (400, 404)
        assert (await home.ask("POST", EXPLAIN, body=b"[]")).error == "invalid_json"
        assert (await home.ask("POST", EXPLAIN, body=b'{"a":1,"a":2}')).json()["parts"] is None
        assert (await home.ask("GET", EXPLAIN)).error == "method_not_allowed"


@pytest.mark.slow
async def test_the_client_can_be_chosen() -> None:
    keys = tuple(ClientKeySettings(name, hashlib.sha256(name.encode()).digest()) for name in "ab")
    async with running_proxy(says(), config=replace(settings(), server=ServerSettings(client_keys=keys))) as home:
        await home.ask("POST", "/v1/chat/completions", ask(), headers=[("Authorization", "Bearer a")])
        for name, reason in (("a", "hit"), ("b", "differs: client")):
            found = await told(home, ask(), f"?client={name}")
            assert (found["client"], found["reason"]) == (name, reason)
        assert (await told(home, ask()))["client"] is None


@virtual_time
async def stored(path: Path) -> None:
    """What a proxy leaves behind that had this configuration."""
    config = settings(pool("k1", cache_as="up"), cache=CacheSettings(backend="sqlite", path=str(path)))
    pipeline = PipelineFixture(says(), says(), config=config)
    await pipeline.services.store.open()
    await pipeline.ask(None, Options(ttl=FOREVER))
    await pipeline.ask(None, Options(ttl=FOREVER, namespace="ci"))
    await pipeline.services.store.close()


@pytest.mark.usefixtures("logging_as_it_was")
class TestCommand:
    @pytest.fixture
    def run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
        monkeypatch.setenv("OPENAI_API_BASE", "http://up.test/v1")
        config = {
            "cache": {"backend": "sqlite", "path": str(tmp_path / "cache.db")},
            "upstreams": [{"name": "openai", "base_url": "http://up.test/v1", "cache_as": "up"}],
        }
        (tmp_path / "c.yaml").write_text(json.dumps(config))

        def run(document: Any, *arguments: str) -> tuple[int, str]:
            (tmp_path / "r.json").write_text(json.dumps(document))
            status = main(["cache", "explain", "r.json", "--config", "c.yaml", *arguments])
            return status, capsys.readouterr().out

        return run

    def test_what_differs(self, run: Any, tmp_path: Path) -> None:
        stored(tmp_path / "cache.db")
        status, out = run(ask(temperature=0), "--format", "json")
        found = json.loads(out)
        assert (status, found["client"], found["compared"]) == (0, None, 2)
        assert (found["reason"], found["nearest"]["namespace"]) == ("differs: temperature", "")
        status, out = run(ask(temperature=0), "--header", "X-Proxy-Cache-Namespace: ci")
        assert "now: differs: temperature" in out
        assert "  differs:     temperature\n" in out

    def test_an_uncacheable_request_is_explained(self, run: Any, tmp_path: Path) -> None:
        stored(tmp_path / "cache.db")
        status, out = run({"input": "x", "background": True}, "--endpoint", "responses")
        assert (status, out.splitlines()[:2]) == (0, ["cacheable: no", "now: uncacheable: background=true"])

    def test_invalid_arguments_are_refused(self, run: Any, tmp_path: Path) -> None:
        stored(tmp_path / "cache.db")
        for arguments in (("--target", "/v1/models"), ("--client", "x"), ("--header", "X-Proxy-Sample: x")):
            with pytest.raises(SystemExit) as stop:
                run(ask(), *arguments)
            assert stop.value.code == 2
