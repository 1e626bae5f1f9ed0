"""Start, health and stop of the real process (docs/deployment.md, docs/commands.md)."""

from __future__ import annotations

import asyncio
import re
import socket
import stat
import tempfile
import time
from pathlib import Path

import aiohttp
import pytest

from tests import upstream_answers
from tests.client import Client, Server, ask, raw, raw_request, read_until_broken, status_of
from tests.launch import AT_ONCE, CANARY, LISTENING, Launch, ProxyProcess, run_command, secret, settings, write_config
from tests.scripted_upstream import ScriptedUpstream, hold, stall


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Start.


def test_start_up_text_names_address_upstreams_keys_and_cache(launch: Launch, upstream: ScriptedUpstream) -> None:
    log = launch(settings(upstream.port, ("k1", "k2"))).stderr_so_far()
    assert LISTENING.search(log)
    assert "settings.yaml" in log
    assert "openai" in log
    assert f"127.0.0.1:{upstream.port}" in log
    assert re.search(r"keys: 2\b|\b2 keys", log), log
    assert "memory" in log
    assert "restart" in log  # answers do not survive one, and the flag that keeps them
    assert "--cache" in log


def test_start_names_pass_through(launch: Launch, upstream: ScriptedUpstream) -> None:
    log = launch(None, {"OPENAI_API_BASE": f"http://127.0.0.1:{upstream.port}/v1"}).stderr_so_far()
    assert "keys: none (pass-through)" in log


def test_start_says_that_https_proxy_is_not_read(launch: Launch, upstream: ScriptedUpstream) -> None:
    log = launch(settings(upstream.port), {"HTTPS_PROXY": "http://127.0.0.1:9"}).stderr_so_far()
    assert "HTTPS_PROXY" in log


async def test_openai_base_url_is_never_read(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port), {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"})
    assert (await client.send(proxy, ask())).status == 200


BROKEN = """\
server:
  prot: 9000
  port: many
cache:
  backend: memory
  backend: off
retry:
  base_delay: 5 parsecs
upstreams:
  - name: openai
    keys: ["${NOBODY_SET_THIS}"]
"""


def test_every_settings_error_at_once_with_its_line(tmp_path: Path) -> None:
    done = run_command(tmp_path, ["serve", "--port", "0"], BROKEN)
    assert done.returncode == 2
    for line, word in [(2, "prot"), (3, "port"), (6, "backend"), (8, "base_delay"), (11, "NOBODY_SET_THIS")]:
        found = [text for text in done.stderr.splitlines() if re.search(rf"settings\.yaml:{line}\b", text)]
        assert found, (line, done.stderr)
        assert any(word in text for text in found), (line, found)


def test_the_proxys_own_address_as_upstream_is_an_error(tmp_path: Path) -> None:
    port = free_port()
    done = run_command(tmp_path, ["serve", "--port", str(port)], settings(port))
    assert done.returncode == 2
    assert "settings.yaml:" in done.stderr


@pytest.mark.parametrize("key", ["sk-your-key-here", "has space", 'sk-"quoted"', "sk-ключ"])
def test_a_key_that_cannot_be_one_is_an_error_naming_its_label(tmp_path: Path, key: str) -> None:
    config = settings(1)
    config["upstreams"][0]["keys"] = [{"name": "the-label", "key": key}]
    done = run_command(tmp_path, ["serve", "--port", "0"], config)
    assert done.returncode == 2
    assert "the-label" in done.stderr
    assert key not in done.stderr


def test_bad_usage_exits_with_2(tmp_path: Path) -> None:
    assert run_command(tmp_path, ["serve", "--nope"]).returncode == 2
    assert run_command(tmp_path, ["serve", "--config", "absent.yaml"]).returncode == 2


def test_a_port_in_use_exits_with_1(launch: Launch, upstream: ScriptedUpstream, tmp_path: Path) -> None:
    proxy = launch(settings(upstream.port))
    done = run_command(tmp_path, ["serve", "--port", str(proxy.port)], settings(upstream.port))
    assert done.returncode == 1
    assert f"127.0.0.1:{proxy.port}: Address already in use; choose another port with --port" in done.stderr


async def test_flags_beat_the_environment_which_beats_the_file(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    config, env = settings(upstream.port, cache={"backend": "memory"}), {"PROXY__CACHE__BACKEND": "off"}
    for args, second in (((), "bypass"), (("--cache", "memory"), "hit")):
        proxy, question = launch(config, env, args), ask()
        await client.send(proxy, question)
        assert (await client.send(proxy, question)).cache == second


async def test_the_upstream_flag(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    url = f"http://127.0.0.1:{upstream.port}/v1"
    proxy = launch(None, {"OPENAI_API_KEY": secret("k1")}, ["--upstream", url])
    assert (await client.send(proxy, ask())).status == 200
    assert upstream.last.key == secret("k1")


def test_check_shows_the_settings_and_no_secret(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    done = run_command(tmp_path, ["check"], settings(upstream.port))
    assert done.returncode == 0, done.stderr
    assert "k1" in done.stdout
    assert CANARY.search(done.stdout + done.stderr) is None
    assert run_command(tmp_path, ["check"], BROKEN).returncode == 2
    assert upstream.count == 0


# Health.


def test_the_health_command(launch: Launch, upstream: ScriptedUpstream, tmp_path: Path) -> None:
    proxy = launch(settings(upstream.port))
    assert run_command(tmp_path, ["health", "--port", str(proxy.port)]).returncode == 0
    assert run_command(tmp_path, ["health", "--port", str(free_port())]).returncode == 1


async def test_probes_take_any_host_and_never_call_upstream(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    for path in ("/healthz", "/readyz"):
        for host in ("evil.example", "10.0.0.7:8484", "localhost"):
            assert status_of(await raw(proxy, raw_request("GET", path, host=host))) == 200
    assert upstream.count == 0


async def test_metrics_and_status(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    metrics = await client.get(proxy, "/metrics")
    assert metrics.status == 200
    assert metrics.headers["Content-Type"].startswith("text/plain")
    assert b"# TYPE" in metrics.body
    status = await client.get(proxy, "/_proxy/status")
    assert status.status == 200
    assert isinstance(status.json(), dict)
    assert upstream.count == 0


async def test_the_ops_listener(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    port = free_port()
    keys = [{"name": "anna", "key": secret("anna")}]
    launch(settings(upstream.port, server={"ops": f"127.0.0.1:{port}", "client_keys": keys}))

    ops = Server(f"http://127.0.0.1:{port}", port)
    for path in ("/healthz", "/readyz", "/metrics"):
        assert (await client.get(ops, path, Host="10.1.2.3")).status == 200
    for path in ("/v1/models", "/_proxy/status", "/_proxy/keys", "/"):
        assert (await client.get(ops, path)).status == 404
    assert upstream.count == 0


async def test_a_unix_socket(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as short:  # a socket's path is at most about 100 bytes
        path = Path(short) / "proxy.sock"
        config = settings(upstream.port, server={"socket": str(path)})
        process = ProxyProcess(["serve", "--config", str(write_config(tmp_path, config))], tmp_path, {})
        try:
            process.start(re.compile("listening on"))
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            connector = aiohttp.UnixConnector(str(path))
            async with (
                aiohttp.ClientSession(connector=connector) as session,
                session.get("http://localhost/v1/models") as answer,
            ):
                assert answer.status == 200
        finally:
            problems = process.finish()
        assert not problems, problems
        assert not path.exists()


# Stop.


def test_an_idle_proxy_stops_at_once_with_0(launch: Launch, upstream: ScriptedUpstream) -> None:
    proxy = launch(settings(upstream.port, server={"drain_timeout": "30s"}))
    with socket.create_connection(("127.0.0.1", proxy.port)) as idle:
        idle.sendall(raw_request("GET", "/healthz"))
        assert idle.recv(1000).startswith(b"HTTP/1.1 200")
        proxy.terminate()
        assert proxy.wait(AT_ONCE) == 0


async def test_a_running_stream_finishes_after_sigterm(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy, gate = launch(settings(upstream.port, server={"drain_timeout": "20s"})), upstream.gate()
    events = upstream_answers.chat_events(include_usage=True)
    upstream.always(
        *upstream_answers.stream(events[:2], end=False), hold(gate), *upstream_answers.stream(events[2:])[1:]
    )
    question = ask(stream=True, stream_options={"include_usage": True})
    async with client.open(proxy, question) as answer:
        got = await answer.content.readexactly(len(b"".join(events[:2])))
        proxy.terminate()
        end = time.monotonic() + AT_ONCE
        refused = False
        while not refused and time.monotonic() < end:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
                writer.close()
                await asyncio.sleep(0.02)
            except OSError:
                refused = True
        assert refused, "new connections are still taken"
        assert proxy.alive()
        gate.open()
        got += await answer.content.read()
    assert got == b"".join(events)
    assert await asyncio.to_thread(proxy.wait, AT_ONCE) == 0


async def test_sigterm_lets_a_plain_answer_finish(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy, gate = launch(settings(upstream.port, server={"drain_timeout": "20s"})), upstream.gate()
    upstream.always(hold(gate), upstream_answers.chat())
    asking = asyncio.create_task(client.send(proxy, ask()))
    await upstream.until(lambda: upstream.count == 1)
    proxy.terminate()
    await asyncio.sleep(0.2)
    gate.open()
    assert (await asking).status == 200
    assert await asyncio.to_thread(proxy.wait, AT_ONCE) == 0


async def test_beyond_drain_timeout_a_stream_ends_in_an_error_event(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port, server={"drain_timeout": "500ms"}))
    events = upstream_answers.chat_events()[:2]
    upstream.always(*upstream_answers.stream(events, end=False), stall())
    got = b""
    async with client.open(proxy, ask(stream=True)) as answer:
        got += await answer.content.readexactly(len(b"".join(events)))
        proxy.terminate()
        rest, clean = await read_until_broken(answer)
    assert not clean
    got += rest
    assert b'data: {"error"' in got.removeprefix(b"".join(events))
    assert b"[DONE]" not in got
    assert await asyncio.to_thread(proxy.wait, AT_ONCE) == 0


async def test_a_second_sigterm_means_now(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, server={"drain_timeout": "60s"}))
    upstream.always(stall())
    asking = asyncio.create_task(client.send(proxy, ask()))
    await upstream.until(lambda: upstream.count == 1)
    proxy.terminate()
    await asyncio.sleep(0.3)
    assert proxy.alive()
    proxy.terminate()
    await asyncio.to_thread(proxy.wait, AT_ONCE)
    (outcome,) = await asyncio.gather(asking, return_exceptions=True)
    assert isinstance(outcome, BaseException) or outcome.status >= 500
    assert "second signal: cutting off 1 request in flight" in proxy.stderr_so_far()
    assert "drain_timeout" not in proxy.stderr_so_far()


async def test_while_draining_readyz_says_503(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, server={"drain_delay": "30s"}))
    assert (await client.get(proxy, "/readyz")).status == 200
    proxy.terminate()
    end = time.monotonic() + AT_ONCE
    while (await client.get(proxy, "/readyz")).status != 503:
        assert time.monotonic() < end
    assert (await client.get(proxy, "/healthz")).status == 200
    assert (await client.send(proxy, ask())).status == 200  # drain_delay still takes connections
    proxy.terminate()


# The demo.


async def test_the_demo_needs_no_key_and_shows_a_hit(
    upstream: ScriptedUpstream, tmp_path: Path, client: Client
) -> None:
    process = ProxyProcess(["demo", "--port", "0"], tmp_path, {"OPENAI_API_KEY": secret("never-used")})
    try:
        process.start()
        question = ask("Hello from the demo")
        miss, hit = [await client.send(process, question) for _ in range(2)]
        assert (miss.status, miss.cache, hit.cache) == (200, "miss", "hit")
        assert float(miss.headers["X-Proxy-Cost-USD"]) > 0
        assert hit.headers["X-Proxy-Cost-USD"] == "0.000000"
        stream = await client.send(process, ask("a stream", stream=True))
        assert stream.body.endswith(b"data: [DONE]\n\n")
        asked = {"model": "text-embedding-3-small", "input": "a"}
        assert (await client.send(process, asked, path="/v1/embeddings")).status == 200
        assert (await client.get(process, "/v1/models")).json()["data"]
        text = process.stderr_so_far()
        assert "curl" in text
        assert "import" in text
    finally:
        problems = process.finish()
    assert not problems, problems
