from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.kit import Load, problems

CLIENT = "client_keys: [{name: a, key: a-long-enough-client-key}]"
KEYED = "upstreams: [{keys: [abc]}]"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "proxy.local", "[::]"])
def test_other_addresses_than_loopback(load: Load, host: str) -> None:
    (problem,) = problems(load, f"server:\n  host: '{host}'\n{KEYED}")
    assert problem.startswith("settings.yaml:2: server.host: expected a loopback address, or client_keys")
    assert load(f"server: {{host: '{host}', {CLIENT}}}\n{KEYED}").warnings == ()
    (warning,) = load(f"server: {{host: '{host}', allow_anonymous: true}}\n{KEYED}").warnings
    assert "without client_keys" in warning
    assert load(f"server: {{host: '{host}', socket: /tmp/s}}").warnings == ()
    assert problems(load, None, server__host=host)[0].startswith("command line: server.host (--host): ")
    assert problems(load, None, {"PROXY__SERVER__HOST": host})[0].startswith("environment: server.host (PROXY__")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_nothing(load: Load, host: str) -> None:
    assert load(None, server__host=host).warnings == ()


def test_a_broken_value_is_reported_once(load: Load) -> None:
    assert len(problems(load, "server: {host: 0.0.0.0, client_keys: [{name: a}]}")) == 1
    assert len(problems(load, "server: {host: 0.0.0.0, allow_anonymous: maybe}")) == 1
    assert len(problems(load, "server: {ops: '127.0.0.1:8484', port: x}")) == 1
    assert len(problems(load, "server: {port: x}\nupstreams: [{base_url: 'http://127.0.0.1:8484'}]")) == 1


@pytest.mark.parametrize(
    ("server", "url", "own"),
    [
        ("{}", "http://127.0.0.1:8484/v1", True),
        ("{}", "http://localhost:8484", True),
        ("{}", "http://[::1]:8484/v1", True),
        ("{host: 0.0.0.0, allow_anonymous: true}", "http://127.0.0.1:8484/v1", True),
        ("{host: proxy.local, allow_anonymous: true}", "https://proxy.local:8484/v1", True),
        ("{port: 80}", "http://127.0.0.1/v1", True),
        ("{port: 9000}", "http://127.0.0.1:8484/v1", False),
        ("{socket: /tmp/s}", "http://127.0.0.1:8484/v1", False),
        ("{}", "https://other.example:8484/v1", False),
        ("{port: 0}", "http://127.0.0.1:8484/v1", False),
    ],
)
def test_the_proxys_own_address_is_no_upstream(load: Load, server: str, url: str, own: bool) -> None:
    found = problems(load, f"server: {server}\nupstreams:\n- base_url: {url}")
    assert bool(found) is own
    assert all(
        line.startswith("settings.yaml:3: upstreams.0.base_url: expected an upstream, found the proxy's")
        for line in found
    )


def test_plain_http_with_a_key(load: Load) -> None:
    text = "upstreams:\n- {base_url: 'http://other.example/v1', keys: [abc]%s}"
    (problem,) = problems(load, text % "")
    assert problem == (
        "settings.yaml:2: upstreams.0.base_url: expected https, or insecure: true; found plain http with a key to "
        "http://other.example"
    )
    for more in (", insecure: true", ""):
        keyless = (text % more).replace("abc", "") if not more else text % more
        (warning,) = load(keyless).warnings
        assert "plain http" in warning
    assert load("upstreams:\n- {base_url: 'http://127.0.0.1:9/v1', keys: [abc]}").warnings == ()


def test_the_listener_for_probes_has_its_own_port(load: Load) -> None:
    assert (
        "server.ops: expected a port of its own, found server.port (8484)"
        in problems(load, "server: {ops: '0.0.0.0:8484'}")[0]
    )
    assert load("server: {ops: '0.0.0.0:9090'}").settings.server.ops == ("0.0.0.0", 9090)
    assert load("server: {ops: '127.0.0.1:0', port: 0}").settings.server.ops == ("127.0.0.1", 0)
    assert load("server: {ops: '10.0.0.1:8484'}").settings.server.ops == ("10.0.0.1", 8484)


def test_a_sockets_path_is_measured_with_the_home_directory(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/" + "h" * 90)
    assert load("server: {socket: ~/short.sock}").settings.server.socket == "~/short.sock"
    (problem,) = problems(load, "server:\n  socket: ~/proxy-of-the-team.sock")
    assert problem.startswith("settings.yaml:2: server.socket: expected a socket's path of at most 103 bytes, found /h")


def test_risky_settings_are_warnings(load: Load) -> None:
    (warning,) = load(f"server: {{{CLIENT}}}").warnings
    assert "upstreams are called without a credential" in warning
    two = "client_keys: [{name: a, key: a-long-enough-client-key}, {name: b, key: another-long-enough-key}]"
    (warning,) = load(f"server: {{{two}}}\ncache: {{shared: true}}\n{KEYED}").warnings
    assert warning.startswith("cache.shared")
    text = "upstreams:\n- {name: a, keys: [abc]}\n- {name: b, base_url: 'https://other.example/v1'}\n"
    text += "- {name: c, base_url: 'http://127.0.0.1:9/v1'}"
    assert load(text).warnings == ("upstream b has no key: https://other.example is called without a credential",)


UPSTREAM = "upstreams: [{base_url: 'http://elsewhere.example/v1', keys: [{key: '${NOBODY}'}, {key_file: nowhere}]}]"


def test_a_replay_reads_no_upstream_key(load: Load) -> None:
    """A CI without the secrets uses the file that recorded."""
    assert len(problems(load, UPSTREAM)) > 1
    loaded = load(f"cache: {{mode: replay, cassette: c}}\n{UPSTREAM}")
    assert loaded.settings.passthrough
    assert loaded.settings.upstreams[0].base_url == "http://elsewhere.example/v1"
    assert loaded.warnings == ()
    assert load(UPSTREAM, cache__mode="replay", cache__cassette="c").settings.upstreams[0].keys == ()
    assert load(None, {"OPENAI_API_KEY": "sk-your-key"}, cache__mode="replay").settings.passthrough


def test_a_replay_needs_something_to_replay(load: Load) -> None:
    (warning,) = load(None, cache__mode="replay").warnings
    assert "it answers nothing" in warning
    assert load("cache: {mode: replay, backend: sqlite}").warnings == ()
    for text, found in (
        ("cache: {mode: replay, backend: off}", "cache.mode: expected a cache to go with it, found backend: off"),
        ("cache: {when: never, cassette: c}", "cache.cassette: expected a cache to go with it, found when: never"),
    ):
        assert problems(load, text) == [f"settings.yaml:1: {found}"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("server: {workers: 1}", []),
        ("server: {workers: 2}", ["keeps answers of its own", "joins identical requests"]),
        ("server: {workers: 2}\ncache: {backend: sqlite}", ["joins identical requests"]),
        ("server: {workers: 2}\ncache: {coalesce: false}", ["keeps answers of its own"]),
        ("server: {workers: 2}\ncache: {backend: off}", []),
        ("server: {workers: 2}\ncache: {backend: redis}\nredis: {url: 'redis://a'}", []),
    ],
)
def test_what_each_of_several_workers_has_for_itself_is_said(load: Load, text: str, said: list[str]) -> None:
    warnings = load(text).warnings
    assert len(warnings) == len(said)
    assert all(part in warning for part, warning in zip(said, warnings, strict=True))


PUBLIC = f"server: {{host: 0.0.0.0, {CLIENT}}}\n{KEYED}"
STAYS = "(server.host can only change at a start)"


def test_a_reload_is_checked_with_the_listener_that_stays(load: Load) -> None:
    in_force = load(PUBLIC)
    for text, place in ((KEYED, "settings.yaml"), (f"{KEYED}\nserver:\n  host: 127.0.0.1", "settings.yaml:3")):
        assert load(text).settings.server.host == "127.0.0.1"  # at a start, nothing is wrong with it
        (problem,) = problems(load, text, in_force=in_force)
        assert problem.startswith(f"{place}: server.host: expected a loopback address, or client_keys")
        assert problem.endswith(f"found 0.0.0.0 without them {STAYS}")
    (problem,) = problems(load, f"server: {{socket: /tmp/s}}\n{KEYED}", in_force=in_force)
    assert problem.endswith("(server.host, server.socket can only change at a start)")
    anonymous = load(f"server: {{allow_anonymous: true}}\n{KEYED}", in_force=in_force)
    assert "everybody who reaches it may use it" in anonymous.warnings[0]
    other = load(f"server: {{port: 9000, {CLIENT}}}\n{KEYED}", in_force=in_force)
    assert other.settings.server.host == "127.0.0.1"  # what the file says: `with_fixed` says what is in force
    assert len(problems(load, f"server: {{host: 0.0.0.0}}\n{KEYED}", in_force=load(KEYED))) == 1  # as at a start


def test_a_reload_is_checked_with_the_port_the_store_and_the_mode_that_stay(load: Load) -> None:
    upstream = "upstreams: [{base_url: 'http://127.0.0.1:8484', keys: [abc]}]"
    (problem,) = problems(load, f"server: {{port: 9000}}\n{upstream}", in_force=load(KEYED))
    assert problem.startswith("settings.yaml:2: upstreams.0.base_url: expected an upstream, found the proxy's own")
    (problem,) = problems(load, f"cache: {{when: never}}\n{KEYED}", in_force=load(f"cache: {{cassette: c}}\n{KEYED}"))
    assert problem.startswith("settings.yaml: cache.cassette: expected a cache to go with it, found when: never")
    found = problems(load, f"cache: {{mode: replay, cassette: c}}\n{UPSTREAM}", in_force=load(KEYED))
    assert any("NOBODY" in problem for problem in found)  # the proxy would need them: it goes on in mode normal
    frozen = load(f"cache: {{mode: replay, cassette: c}}\n{UPSTREAM}")
    assert load(f"cache: {{cassette: c}}\n{UPSTREAM}", in_force=frozen).settings.upstreams[0].keys == ()


@pytest.mark.parametrize("text", ["", "# later\n", "server:\n", "server: {}\nupstreams: []\n", "{}"])
def test_a_reload_takes_no_file_that_has_lost_its_sections(load: Load, text: str) -> None:
    said = "expected the sections that it had, found none of them"
    assert problems(load, text, in_force=load(KEYED)) == [f"settings.yaml: {said}"]
    assert load(text, in_force=load(text)).sections == frozenset()  # it had none
    automatic = load(KEYED, automatic=True)
    assert problems(load, text, automatic=True, in_force=automatic) == [f"config.yaml: {said}"]


def test_a_reload_takes_no_missing_file(load: Load, tmp_path: Path) -> None:
    automatic = load(KEYED, automatic=True)
    (tmp_path / "config.yaml").unlink()
    (problem,) = problems(load, automatic=True, in_force=automatic)
    assert problem == "config.yaml: expected the sections that it had, found none of them"


def test_a_reload_takes_no_file_without_the_upstreams_or_any_key(load: Load) -> None:
    in_force = load(KEYED)
    environ = {"OPENAI_API_KEY": "sk-proj-0123456789abcdef"}
    assert problems(load, "log: {level: debug}", environ, in_force=in_force) == [
        "settings.yaml: upstreams: expected the section that it had, found none"
    ]
    (problem,) = problems(load, "upstreams: [{name: a}]", in_force=in_force)
    assert problem.startswith("settings.yaml:1: upstreams: expected a key, as before, found none")
    keyless = load("upstreams: [{name: a}]")
    assert load("upstreams: [{name: b}]", in_force=keyless).settings.passthrough
    assert not load(KEYED, in_force=keyless).settings.passthrough


@pytest.mark.parametrize(
    "url",
    [
        "redis://host:notaport",
        "redis://host:99999",
        "rediss://host:-1",
        "http://host:6379",
        "host:6379",
        "redis://host/db",
        "redis://host?socket_timeout=soon",
        "redis://host?colour=blue",
        "redis://[::1",
    ],
)
def test_a_redis_address_that_cannot_be_opened_is_an_error_of_the_settings(load: Load, url: str) -> None:
    (problem,) = problems(load, f"cache: {{backend: redis}}\nredis: {{url: '{url}'}}")
    assert problem.startswith("settings.yaml:2: redis.url: expected redis://")
    assert url not in problem


@pytest.mark.parametrize("port", ["abc", "99999", "-1", "6379x"])
def test_redis_port_is_checked(load: Load, port: str) -> None:
    (problem,) = problems(load, "throttle: {backend: redis}", {"REDIS_HOST": "localhost", "REDIS_PORT": port})
    assert "REDIS_HOST" in problem
    assert "redis.url" in problem


@pytest.mark.parametrize(
    "url",
    [
        "redis://a",
        "redis://u:p@a:6380/3",
        "rediss://a?ssl_cert_reqs=none",
        "unix:///run/redis.sock?db=2",
        "redis://[::1]:1",
    ],
)
def test_a_redis_address_that_can_be_opened_is_accepted(load: Load, url: str) -> None:
    assert load(f"cache: {{backend: redis}}\nredis: {{url: '{url}'}}").settings.redis.url is not None
