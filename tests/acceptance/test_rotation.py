"""New keys and settings without a stop, on the real process (docs/deployment.md)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests import upstream_answers
from tests.client import Client, ask
from tests.launch import Config, Launch, ProxyProcess, run_command, secret, settings, write_config
from tests.scripted_upstream import ScriptedUpstream, hold


async def said(proxy: ProxyProcess, text: str, times: int = 1) -> None:
    """Waits until the log says it."""
    async with asyncio.timeout(10):
        while proxy.stderr_so_far().count(text) < times:
            assert proxy.alive()
            await asyncio.sleep(0.02)


async def key_used(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> str:
    assert (await client.send(proxy, ask())).status == 200
    return upstream.last.key or ""


async def test_sighup_brings_new_keys_and_settings(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    proxy = launch(settings(upstream.port, ("k1",)))
    question = ask()
    assert (await client.send(proxy, question)).cache == "miss"
    assert await key_used(proxy, upstream, client) == secret("k1")
    write_config(tmp_path, settings(upstream.port, ("k2",), server={"max_in_flight": 7}, cache={"memory_size": "1MiB"}))
    proxy.signal(signal.SIGHUP)
    await said(proxy, "new settings in force")
    assert await key_used(proxy, upstream, client) == secret("k2")
    assert (await client.send(proxy, question)).cache == "hit"  # what is stored stays
    status = (await client.get(proxy, "/_proxy/status")).json()
    assert status["settings"]["server"]["max_in_flight"] == "7"
    assert "cache.memory_size takes effect at the next start" in proxy.stderr_so_far()


async def test_invalid_settings_change_nothing_and_are_logged(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    proxy = launch(settings(upstream.port, ("k1",)))
    write_config(tmp_path, "server:\n  prot: 1\nupstreams: [{keys: ['${NOBODY_SET_THIS}']}]\n")
    proxy.signal(signal.SIGHUP)
    await said(proxy, "the old ones stay")
    assert "settings.yaml:2: server.prot" in proxy.stderr_so_far()
    assert "settings.yaml:3: upstreams.0.keys.0" in proxy.stderr_so_far()
    assert await key_used(proxy, upstream, client) == secret("k1")
    write_config(tmp_path, settings(upstream.port, ("k2",)))
    proxy.signal(signal.SIGHUP)
    await said(proxy, "new settings in force")
    assert await key_used(proxy, upstream, client) == secret("k2")


async def test_nothing_in_flight_is_dropped(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    gate = upstream.gate()
    upstream.queue(
        "/v1/chat/completions", upstream_answers.stream(upstream_answers.chat_events(["a", "b"], False), hold(gate))
    )
    proxy = launch(settings(upstream.port, ("k1",)))
    answers = [asyncio.create_task(client.send(proxy, ask(stream=True)))]
    await upstream.until(lambda: upstream.count == 1)
    for turn in range(1, 4):
        write_config(tmp_path, settings(upstream.port, (f"n{turn}",)))
        proxy.signal(signal.SIGHUP)
        await said(proxy, "new settings in force", turn)
        answers += [asyncio.create_task(client.send(proxy, ask())) for _ in range(10)]
    gate.open()
    assert [reply.status for reply in await asyncio.gather(*answers)] == [200] * 31


CLIENT_KEY = secret("client")
PUBLIC = {"host": "0.0.0.0", "client_keys": [{"name": "a", "key": CLIENT_KEY}]}


def public(port: int, **sections: Any) -> Config:
    """Open to other machines, for those who have a client key."""
    return settings(port, server=PUBLIC, **sections)


def text_of(config: Config) -> str:
    return yaml.safe_dump(config, sort_keys=False)


def cut(config: Config, before: str) -> str:
    """The file as a writer leaves it that has come so far."""
    head, found, _ = text_of(config).partition(before)
    assert found
    return head


async def guarded(proxy: ProxyProcess, client: Client, times: int = 1) -> None:
    """It serves those who have a key, and nobody else; with the pool's key."""
    for _ in range(times):
        assert (await client.send(proxy, ask())).status == 401
        assert (await client.send(proxy, ask(), {"Authorization": "Bearer another"})).status == 401
        assert (await client.send(proxy, ask(), {"Authorization": f"Bearer {CLIENT_KEY}"})).status == 200


@pytest.mark.parametrize("workers", [1, 2])
async def test_no_reload_opens_what_a_start_would_refuse(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path, workers: int
) -> None:
    config = public(upstream.port, throttle={"limits": {"*": {"rpm": 1000}}})
    proxy = await asyncio.to_thread(launch, config, args=("--workers", str(workers)))
    await guarded(proxy, client)
    exposed = "server.host: expected a loopback address, or client_keys"
    emptied = "expected the sections that it had, found none of them"
    keyless = "upstreams: expected a key, as before, found none"
    inner, text = settings(upstream.port), text_of(config)
    broken = {
        text_of({name: section for name, section in config.items() if name != "server"}): exposed,
        text_of(inner | {"server": {"host": "127.0.0.1"}}): exposed,
        text_of(inner | {"server": {"socket": str(tmp_path / "socket")}}): exposed,
        "": emptied,
        "# to be written\n\n# later\n": emptied,
        "server:\n": emptied,
        "{}": emptied,
        text[:3]: "found a single value",
        cut(config, "  client_keys:"): exposed,
        cut(config, "upstreams:"): "upstreams: expected the section that it had, found none",
        cut(config, "  base_url:"): keyless,
        cut(config, "  - name: k1"): keyless,
        cut(config, "    key: " + secret("k1")): "upstreams.0.keys.0",
        cut(config, "'*'") + "'*": "settings.yaml:",
    }
    for turn, (written, words) in enumerate(broken.items(), 1):
        before = len(proxy.stderr_so_far())
        write_config(tmp_path, written)
        proxy.signal(signal.SIGHUP)
        await said(proxy, "the old ones stay", turn)
        assert words in proxy.stderr_so_far()[before:], written
        await guarded(proxy, client, workers)
    (tmp_path / "settings.yaml").unlink()
    proxy.signal(signal.SIGHUP)
    await said(proxy, "the old ones stay", len(broken) + 1)
    await guarded(proxy, client, workers)
    assert upstream.last.key == secret("k1")
    assert "new settings in force" not in proxy.stderr_so_far()
    config["upstreams"][0]["keys"][0]["key"] = secret("k2")
    write_config(tmp_path, config)
    proxy.signal(signal.SIGHUP)
    await said(proxy, "new settings in force")
    await guarded(proxy, client)
    assert upstream.last.key == secret("k2")


async def test_a_changed_key_file_puts_no_emptied_file_in_force(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text(secret("old"))
    key.chmod(0o600)
    config = public(upstream.port)
    config["upstreams"][0]["keys"] = [{"name": "file", "key_file": str(key)}]
    proxy = launch(config)
    write_config(tmp_path, "# nothing any more\n")
    key.write_text(secret("newer"))
    await said(proxy, "the old ones stay")
    await guarded(proxy, client)
    assert upstream.last.key == secret("old")


def file_key(port: int, path: Path) -> Config:
    config = settings(port)
    config["upstreams"][0]["keys"] = [{"name": "file", "key_file": str(path)}]
    return config


async def test_a_changed_key_file_is_followed(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    """As Kubernetes mounts secrets: a symbolic link that is swapped."""
    link = tmp_path / "key"
    for name in ("old", "new", "bad"):
        (tmp_path / name).write_text("two words" if name == "bad" else secret(name))
        (tmp_path / name).chmod(0o600)
    link.symlink_to(tmp_path / "old")
    proxy = launch(file_key(upstream.port, link))
    assert await key_used(proxy, upstream, client) == secret("old")

    def swap(name: str) -> None:
        (tmp_path / "next").symlink_to(tmp_path / name)
        os.replace(tmp_path / "next", link)

    swap("bad")
    await said(proxy, "the old ones stay")
    assert await key_used(proxy, upstream, client) == secret("old")
    swap("new")
    await said(proxy, "new settings in force")
    assert await key_used(proxy, upstream, client) == secret("new")
    assert proxy.stderr_so_far().count("the old ones stay") == 1  # said once, not at every look


async def test_a_rejected_key_gets_another_chance_a_cooling_one_does_not(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    refusals = {secret("k1"): upstream_answers.unauthorized(), secret("k2"): upstream_answers.rate_limited("60")}
    upstream.script = lambda request: refusals.get(request.key or "") or upstream_answers.chat("Hi")
    proxy = launch(settings(upstream.port, ("k1", "k2", "k3")))
    for _ in range(3):
        assert (await client.send(proxy, ask())).status == 200

    async def states() -> dict[str, str]:
        rows = (await client.get(proxy, "/_proxy/keys")).json()["keys"]
        return {row["name"]: max((state["state"] for state in row["states"]), default="ready") for row in rows}

    assert await states() == {"k1": "rejected", "k2": "cooling", "k3": "ready"}
    proxy.signal(signal.SIGHUP)
    await said(proxy, "new settings in force")
    assert await states() == {"k1": "ready", "k2": "cooling", "k3": "ready"}


async def test_limits_hold_across_a_reload(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    """No window of 60 s has more than the limit, whatever happens to the settings meanwhile."""
    limited = settings(upstream.port, throttle={"limits": {"*": {"rpm": 3}}, "max_wait": "0s"})
    proxy = launch(limited)
    assert [(await client.send(proxy, ask())).status for _ in range(2)] == [200, 200]
    for turn in (1, 2):
        proxy.signal(signal.SIGHUP)
        await said(proxy, "new settings in force", turn)
    replies = [await client.send(proxy, ask()) for _ in range(2)]
    assert [(reply.status, reply.error) for reply in replies] == [(200, None), (429, "throttled")]
    write_config(tmp_path, settings(upstream.port, throttle={"limits": {"*": {"rpm": 4}}, "max_wait": "0s"}))
    proxy.signal(signal.SIGHUP)
    await said(proxy, "new settings in force", 3)
    assert [(await client.send(proxy, ask())).status for _ in range(2)] == [200, 429]


# Keys from commands.


async def test_a_key_from_a_command(launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(secret("printed") + "\n")
    config = settings(upstream.port)
    config["upstreams"][0]["keys"] = [{"name": "cmd", "key_command": ["cat", str(tmp_path / "key")]}]
    proxy = launch(config)
    assert await key_used(proxy, upstream, client) == secret("printed")
    (tmp_path / "key").write_text(secret("again"))
    proxy.signal(signal.SIGHUP)
    await said(proxy, "new settings in force")
    assert await key_used(proxy, upstream, client) == secret("again")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["false"], "failed (exit status 1)"),
        (["true"], "prints nothing"),
        (["/no/such/command"], "No such file"),
        (["printf", "two words"], "contains white space"),
        (["printf", "\\377"], "other bytes"),
    ],
)
def test_commands_that_give_no_key(argv: list[str], words: str, tmp_path: Path) -> None:
    config = {"upstreams": [{"keys": [{"name": "cmd", "key_command": argv}]}]}
    done = run_command(tmp_path, ["check"], config)
    assert done.returncode == 2
    assert words in done.stderr
    assert "upstreams.0.keys.0" in done.stderr


def test_a_config_yaml_that_was_not_named_runs_no_command(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    config = {"upstreams": [{"keys": [{"key_command": ["touch", str(trap)]}]}]}
    write_config(tmp_path, config, "config.yaml")
    done = run_command(tmp_path, ["check"])
    assert done.returncode == 2
    assert "named with --config config.yaml" in done.stderr
    assert not trap.exists()


# Other ways up.


@asynccontextmanager
async def forward_proxy() -> AsyncIterator[tuple[int, list[bytes]]]:
    """An HTTP proxy that knows absolute-form and CONNECT; the heads it saw."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        heads.append(head)
        target = head.split(b" ")[1].decode()
        host, port = target.removeprefix("http://").split("/")[0].split(":")
        up_reader, up_writer = await asyncio.open_connection(host, int(port))
        if head.startswith(b"CONNECT"):
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            lines = head.replace(f"http://{host}:{port}".encode(), b"", 1).split(b"\r\n")
            up_writer.write(b"\r\n".join(line for line in lines if not line.startswith(b"Proxy-")))

        async def pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError, asyncio.CancelledError):
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
            sink.close()

        await asyncio.gather(pipe(reader, up_writer), pipe(up_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], heads
    finally:
        server.close()


async def test_an_upstream_behind_a_proxy(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    async with forward_proxy() as (port, heads):
        config = settings(upstream.port)
        config["upstreams"][0]["proxy"] = f"http://user:{secret('proxy')}@127.0.0.1:{port}"
        proxy = launch(config)
        assert (await client.send(proxy, ask())).status == 200
        assert heads[0].startswith(b"POST http://127.0.0.1:%d/v1/chat/completions HTTP/1.1\r\n" % upstream.port)
        assert b"\r\nProxy-Authorization: Basic " in heads[0]
        shown = run_command(tmp_path, ["check", "--config", "settings.yaml"])
        assert secret("proxy") not in shown.stdout
        assert 'proxy: "***"' in shown.stdout, shown.stdout


async def test_a_proxy_that_is_not_there(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    config = settings(upstream.port, retry={"max_retries": 0})
    config["upstreams"][0]["proxy"] = "http://127.0.0.1:9"
    reply = await client.send(launch(config), ask())
    assert (reply.status, reply.error) == (502, "upstream_unreachable")
    assert not upstream.count


@pytest.mark.parametrize("value", ["127.0.0.1:3128", "ftp://a:1", "http://a", "http://a:1/x", "http://a:1?b"])
def test_invalid_proxy_addresses_are_errors(value: str, tmp_path: Path) -> None:
    done = run_command(tmp_path, ["check"], {"upstreams": [{"proxy": value}]})
    assert done.returncode == 2
    assert "upstreams.0.proxy: expected a proxy such as" in done.stderr


def test_a_ca_file_must_hold_certificates(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing of that kind")
    for name, words in (("ca.pem", "no certificates"), ("absent.pem", "No such file")):
        done = run_command(tmp_path, ["check"], {"upstreams": [{"ca_file": name}]})
        assert done.returncode == 2
        assert "upstreams.0.ca_file: expected a file with certificates" in done.stderr
        assert words in done.stderr


@asynccontextmanager
async def tls_upstream(folder: Path) -> AsyncIterator[int]:
    """An API behind a certificate that only `folder/ca.pem` vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "ca.pem", folder / "key.pem")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        writer.write(upstream_answers.response(200, upstream_answers.completion("over TLS"), {"Connection": "close"}))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_ca_file_is_trusted_also_through_a_proxy(launch: Launch, client: Client, tmp_path: Path) -> None:
    async with tls_upstream(tmp_path) as port, forward_proxy() as (outlet, heads):
        for changes, status in (
            ({}, 502),
            ({"ca_file": "ca.pem"}, 200),
            ({"ca_file": "ca.pem", "proxy": f"http://127.0.0.1:{outlet}"}, 200),
        ):
            config = settings(port, retry={"max_retries": 0})
            config["upstreams"][0] |= {"base_url": f"https://localhost:{port}/v1", **changes}
            proxy = await asyncio.to_thread(launch, config)
            reply = await client.send(proxy, ask())
            assert reply.status == status, reply.body
            assert status == 200 or b"certificate" in reply.body
        assert heads[0].startswith(b"CONNECT localhost:%d HTTP/1.1\r\n" % port)


# Entra ID.


@asynccontextmanager
async def managed_identity(seconds: float) -> AsyncIterator[tuple[int, list[str]]]:
    """The endpoint from which App Service gives tokens (Microsoft: *Managed identities*, REST endpoint reference)."""
    given: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"resource=https" in head
        given.append(secret(f"token-{len(given)}"))
        body = json.dumps(
            {
                "access_token": given[-1],
                "expires_on": str(int(time.time() + seconds)),
                "resource": "https://cognitiveservices.azure.com",
                "token_type": "Bearer",
            }
        ).encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b"
            % (len(body), body)
        )
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], given
    finally:
        server.close()


def entra(port: int, **more: Any) -> Config:
    upstream = {"kind": "azure", "base_url": f"http://127.0.0.1:{port}", "entra_id": True, "insecure": True}
    config = settings(port, **more)
    config["upstreams"] = [upstream]
    return config


async def test_azure_with_tokens_of_the_proxys_own_identity(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    async with managed_identity(3600) as (port, given):
        variables = {"IDENTITY_ENDPOINT": f"http://127.0.0.1:{port}/token", "IDENTITY_HEADER": "x"}
        proxy = await asyncio.to_thread(launch, entra(upstream.port), variables)
        assert (await client.send(proxy, ask())).status == 200
        assert upstream.last.header("Authorization") == f"Bearer {given[0]}"
        assert upstream.last.header("api-key") is None
        assert "keys: 1" in proxy.stderr_so_far()


def test_entra_id_is_azures_and_stands_alone(tmp_path: Path) -> None:
    broken = {
        "upstreams": [
            {"entra_id": True},
            {"kind": "azure", "base_url": "https://n.openai.azure.com", "entra_id": True, "keys": [secret("k")]},
        ]
    }
    done = run_command(tmp_path, ["check"], yaml.safe_dump(broken))
    assert done.returncode == 2
    assert "upstreams.0.entra_id: expected kind: azure" in done.stderr
    assert "upstreams.1.entra_id: expected keys or entra_id: true, found both" in done.stderr
