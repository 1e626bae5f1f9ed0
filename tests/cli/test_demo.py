"""`openai-proxy demo`: the real process, and the snippets it prints."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from proxy.cli.demo import introduction, simulated
from proxy.config.settings import Settings
from proxy.simulator.server import SPECIAL_PROMPTS
from tests.client import Client, ask
from tests.launch import ProxyProcess, environment


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxyProcess]:
    """Yield a demo whose settings and environment name upstreams and keys; it must use none of them."""
    home = tmp_path_factory.mktemp("demo")
    (home / "config.yaml").write_text("upstreams:\n  - base_url: https://api.openai.com/v1\n    keys: [sk-mine]\n")
    process = ProxyProcess(["demo", "--port", "0"], home, {"OPENAI_API_KEY": "sk-of-the-environment"})
    process.start()
    _wait_for(process, list(SPECIAL_PROMPTS)[-1])
    yield process
    problems = process.finish()
    assert not problems, problems
    assert process.process.returncode == 0


def _wait_for(process: ProxyProcess, words: str) -> str:
    end = time.monotonic() + 10
    while words not in (text := process.stderr_so_far()):
        assert time.monotonic() < end, text
        time.sleep(0.02)
    return text


def pasted(text: str, first: str) -> str:
    """Return the snippet that begins with this word, without its indentation."""
    block = text[text.index(f"  {first}") :]
    return textwrap.dedent(re.split(r"\n(?=\S)", block)[0])


@pytest.mark.slow
def test_banner_lists_special_prompts_and_no_configured_key(demo: ProxyProcess) -> None:
    text = demo.stderr_so_far()
    for start, what in SPECIAL_PROMPTS.items():
        assert re.search(rf"^  {re.escape(start)} +{re.escape(what)}$", text, re.MULTILINE)
    assert "sk-mine" not in text
    assert "api.openai.com" not in text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_command_shows_a_miss_and_then_a_free_hit(demo: ProxyProcess, tmp_path: Path) -> None:
    command = pasted(demo.stderr_so_far(), "curl ")
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=20, env=environment(tmp_path, {})
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"(?i)^x-proxy-cache: (\w+)", done.stdout, re.MULTILINE) == ["miss", "hit"]
    first, second = re.findall(r"(?i)^x-proxy-cost-usd: (\S+)", done.stdout, re.MULTILINE)
    assert float(first) > 0
    assert float(second) == 0
    ids = re.findall(r'"id":"(chatcmpl-\w+)"', done.stdout)
    assert len(ids) == 2
    assert len(set(ids)) == 1


@pytest.mark.slow
def test_the_python_snippet_shows_a_miss_and_then_a_free_hit(demo: ProxyProcess, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", pasted(demo.stderr_so_far(), "from openai import")],
        capture_output=True,
        text=True,
        timeout=30,
        env=environment(tmp_path, {}),
    )
    assert done.returncode == 0, done.stderr
    first, answer, second, again = done.stdout.splitlines()
    assert first.startswith("miss 0.000")
    assert second == "hit 0.000000 USD"
    assert answer == again
    assert "Hello from Python" in answer


@pytest.mark.parametrize("prompt", ["provoke 429", "provoke 500"])
async def test_provoked_failures_are_retried(demo: ProxyProcess, client: Client, prompt: str) -> None:
    answer = await client.send(demo, ask(f"{prompt}, please"))
    assert answer.status == 200
    assert answer.headers["X-Proxy-Attempts"] == "2"
    assert answer.headers["X-Proxy-Key"] == "demo"
    assert answer.headers["X-Proxy-Upstream"] == "simulated"


@pytest.mark.slow
async def test_streams_embeddings_and_models(demo: ProxyProcess) -> None:
    async with openai.AsyncOpenAI(base_url=demo.base_url, api_key="unused") as sdk:
        for _ in range(2):
            stream = await sdk.chat.completions.create(
                model="gpt-4o", messages=[{"role": "user", "content": "Hello, stream"}], stream=True
            )
            text = "".join([c.choices[0].delta.content or "" async for c in stream])
            assert "Hello, stream" in text
        vectors = await sdk.embeddings.create(model="text-embedding-3-small", input=["a", "b"])
        assert [len(item.embedding) for item in vectors.data] == [1536, 1536]
        assert (await sdk.models.list()).data


def test_only_the_upstream_of_the_settings_changes() -> None:
    settings = simulated(Settings(), "http://127.0.0.1:1/v1")
    assert [(u.name, u.base_url, [k.label for k in u.keys]) for u in settings.upstreams] == [
        ("simulated", "http://127.0.0.1:1/v1", ["demo"])
    ]
    assert settings.cache == Settings().cache
    assert not settings.passthrough


def test_snippets_show_a_client_key_if_one_is_needed() -> None:
    text = "\n".join(introduction("http://127.0.0.1:1", True, SPECIAL_PROMPTS))
    assert "-H 'Authorization: Bearer A-CLIENT-KEY'" in text
    assert 'api_key="A-CLIENT-KEY"' in text
