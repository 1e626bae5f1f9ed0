from __future__ import annotations

import argparse
import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from proxy.cli import check
from proxy.config.secret import Secret
from proxy.config.settings import KeySettings, Settings, UpstreamSettings


def run(argv: list[str], monkeypatch: pytest.MonkeyPatch, cwd: Path, text: str | None = None, **environ: str) -> int:
    monkeypatch.chdir(cwd)
    for name in ("OPENAI_API_KEY", "OPENAI_API_BASE", "AZURE_OPENAI_ENDPOINT", "AZURE_OPENAI_API_KEY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    if text is not None:
        (cwd / "s.yaml").write_text(text)
        (cwd / "s.yaml").chmod(0o600)
        argv = ["--config", "s.yaml", *argv]
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    return check.run(parser.parse_args(argv))


def test_effective_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "server: {port: 9}\nupstreams: [{keys: [{name: mine, key: hunter2}]}]"
    assert run(["--log-level", "debug"], monkeypatch, tmp_path, text, HTTPS_PROXY="x") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "# settings file: s.yaml"
    assert out.splitlines()[-2] == "# keys: 1"
    assert re.fullmatch(r"# prices: of \d{4}-\d\d-\d\d, -?\d+ days old", out.splitlines()[-1])
    assert any(line.split() == ["port:", "9", "#", "s.yaml:1"] for line in out.splitlines())
    assert any(line.split() == ["level:", "debug", "#", "flag", "--log-level"] for line in out.splitlines())
    assert err == "warning: HTTPS_PROXY is set, but not read: upstreams are called directly\n"
    assert "hunter2" not in out + err


def test_without_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([], monkeypatch, tmp_path) == 0
    out, err = capsys.readouterr()
    assert out.startswith("# settings file: none\n")
    assert "# keys: none (pass-through)\n" in out
    assert err == ""


def test_the_limits_of_a_tier_are_shown_where_they_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
throttle: {tier: 1, limits: {gpt-4o-mini: {tpm: 7}}}
upstreams:
- {name: one, keys: [{name: mine, key: hunter2, limits: {rpm: 9}}]}
- {name: two, kind: azure, base_url: "https://n.openai.azure.com", keys: [{name: theirs, key: hunter3}]}
"""
    assert run([], monkeypatch, tmp_path, text) == 0
    out, _ = capsys.readouterr()
    result = [line for line in out.splitlines() if line.startswith("# limits")]
    assert result[0] == "# limits of mine for *: rpm 9, tpm 200000, tpd 2000000"
    assert "# limits of mine for text-embedding-*: rpm 9, tpm 1000000" in result
    assert result[-2:] == [
        "# limits of mine for gpt-4o-mini: rpm 500, tpm 7, rpd 10000",
        "# limits of theirs for gpt-4o-mini: tpm 7",
    ]


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run([], monkeypatch, tmp_path, "server: {prot: 9}\ncahce: {}")
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(":")[1] for line in err.splitlines()] == ["1", "2"]


@pytest.mark.parametrize(
    ("upstream", "url"),
    [
        (UpstreamSettings(), "https://api.openai.com/v1/models"),
        (
            UpstreamSettings(kind="azure", base_url="https://n", api_version="2024-10-21"),
            "https://n/openai/models?api-version=2024-10-21",
        ),
        (UpstreamSettings(kind="azure", base_url="https://n"), "https://n/openai/v1/models"),
    ],
)
def test_where_models_are_listed(upstream: UpstreamSettings, url: str) -> None:
    assert check.models_url(upstream) == url


def test_credentials() -> None:
    key = KeySettings("a", Secret("hunter2"), "org-1", "proj_1")
    assert check.credentials(UpstreamSettings(), key) == {
        "Authorization": "Bearer hunter2",
        "OpenAI-Organization": "org-1",
        "OpenAI-Project": "proj_1",
    }
    assert check.credentials(UpstreamSettings(), KeySettings("a", Secret("hunter2"))) == {
        "Authorization": "Bearer hunter2"
    }
    assert check.credentials(UpstreamSettings(kind="azure"), key) == {"api-key": "hunter2"}


@pytest.fixture
async def models() -> AsyncIterator[str]:
    """An upstream that knows one key and answers the others in its own ways."""
    seen: list[web.Request] = []

    async def handle(request: web.Request) -> web.Response:
        seen.append(request)
        key = request.headers.get("api-key") or request.headers["Authorization"].removeprefix("Bearer ")
        if key == "slow":
            await asyncio.sleep(5)
        if key == "moved":
            return web.Response(status=302, headers={"Location": "/elsewhere"})
        statuses = {"good": 200, "busy": 429, "bad": 401, "odd": 418}
        return web.Response(status=statuses[key], text=f"you sent {key}")

    app = web.Application()
    app.router.add_get("/v1/models", handle)
    app.router.add_get("/openai/models", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()
    assert all(request.path != "/elsewhere" for request in seen)


def pool(base_url: str, *secrets: str) -> UpstreamSettings:
    return UpstreamSettings(
        base_url=base_url, keys=tuple(KeySettings(f"key-{i}", Secret(key)) for i, key in enumerate(secrets))
    )


@pytest.mark.slow
async def test_online(models: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "_TIMEOUT", 0.3)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # not read
    azure = UpstreamSettings(
        name="azure", kind="azure", base_url=models, api_version="2024-10-21", keys=(KeySettings("az", Secret("good")),)
    )
    dead = UpstreamSettings(name="dead", base_url="http://127.0.0.1:1/v1", keys=(KeySettings("d", Secret("x")),))
    all_of_them = pool(f"{models}/v1", "good", "bad", "busy", "odd", "moved", "slow")
    works = await check._online(Settings(upstreams=(all_of_them, azure, dead)))
    assert not works
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "key-0  openai  200 ok",
        "key-1  openai  401 the key is not accepted",
        "key-2  openai  429 the key works, but has reached a limit",
        "key-3  openai  418 unexpected",
        "key-4  openai  302 a redirect, which is not followed",
        "key-5  openai  no answer within 0.3 s",
        "az     azure  200 ok",
        "d      dead  not reached: ClientConnectorError",
    ]
    assert await check._online(Settings(upstreams=(pool(f"{models}/v1", "good", "busy"),)))


@pytest.mark.parametrize(("works", "status"), [(True, 0), (False, 1)])
def test_the_exit_status_says_whether_the_keys_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool, status: int
) -> None:
    async def online(settings: Settings) -> bool:
        return works

    monkeypatch.setattr(check, "_online", online)
    assert run(["--online"], monkeypatch, tmp_path) == status


def test_online_without_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--online"], monkeypatch, tmp_path) == 0
    assert capsys.readouterr().out.endswith("no keys to ask\n")
