from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from proxy.config.loader import FLAGS
from proxy.config.loader import load as load_settings
from proxy.config.problems import SettingsError
from proxy.config.schema import leaves
from proxy.config.settings import Settings, UpstreamSettings
from tests.config.kit import Load, problems, write

ROOT = Path(__file__).resolve().parents[2]


def test_with_nothing_at_all_the_defaults_hold(load: Load) -> None:
    loaded = load()
    assert loaded.settings == Settings()
    assert loaded.settings.passthrough
    assert loaded.settings.upstreams == (UpstreamSettings(name="openai", base_url="https://api.openai.com/v1"),)
    assert loaded.file is None
    assert loaded.warnings == ()
    assert set(loaded.sources.values()) == {"default"}
    assert {path for path, _ in leaves()} <= set(loaded.sources)


def test_the_repositorys_file_is_the_documented_default(tmp_path: Path) -> None:
    loaded = load_settings(ROOT / "config.yaml", {}, {}, tmp_path)
    assert loaded.settings == Settings()
    assert loaded.warnings == ()
    budget = {path for path, _ in leaves() if path.startswith("cost.budget.")}
    written = {path for path, source in loaded.sources.items() if source != "default"}
    assert {path for path, _ in leaves()} - {"upstreams"} - budget <= written


def test_the_repositorys_file_leaves_the_environments_upstreams(tmp_path: Path) -> None:
    environ = {"OPENAI_API_KEY": "sk-a,sk-b", "REDIS_URL": "redis://localhost"}
    settings = load_settings(ROOT / "config.yaml", {}, environ, tmp_path).settings
    assert [key.label for key in settings.upstreams[0].keys] == ["openai-1", "openai-2"]


def test_the_example_upstreams_in_the_repositorys_file(tmp_path: Path) -> None:
    lines = (ROOT / "config.yaml").read_text().splitlines()
    start = lines.index("# upstreams:")
    block = [line[2:] for line in lines[start : lines.index("", start)]]
    write(tmp_path / "key", "sk-second")
    text = (
        "\n".join(block).replace("/run/secrets/openai-2", "key").replace("org-…", "org-1").replace("proj_…", "proj_1")
    )
    file = write(tmp_path / "settings.yaml", text)
    settings = load_settings(file, {}, {"OPENAI_API_KEY": "sk-a", "AZURE_OPENAI_API_KEY": "b"}, tmp_path).settings
    assert [[key.label for key in upstream.keys] for upstream in settings.upstreams] == [
        ["openai-1", "second"],
        ["azure-1"],
    ]


def test_precedence(load: Load) -> None:
    text = "server: {port: 1, host: 127.0.0.1}\nlog: {level: debug}"
    environ = {"PROXY__SERVER__PORT": "2", "PROXY__SERVER__MAX_IN_FLIGHT": "7"}
    loaded = load(text, environ, server__port=3, log__format="json", server__host=None)
    server = loaded.settings.server
    assert (server.port, server.max_in_flight, loaded.settings.log.level, loaded.settings.log.format) == (
        3,
        7,
        "debug",
        "json",
    )
    assert load(text, environ).settings.server.port == 2
    assert load(text).settings.server.port == 1
    sources = loaded.sources
    assert sources["server.port"] == "flag --port"
    assert sources["server.max_in_flight"] == "env PROXY__SERVER__MAX_IN_FLIGHT"
    assert sources["server.host"] == "settings.yaml:1"
    assert sources["log.level"] == "settings.yaml:2"
    assert sources["log.format"] == "flag --log-format"
    assert sources["cache.ttl.chat"] == "default"


def test_every_flag_has_a_setting() -> None:
    assert set(FLAGS) - {"upstream"} <= {path for path, _ in leaves()}


def test_all_problems_come_at_once_in_order(load: Load) -> None:
    found = problems(
        load,
        "server:\n  port: 99999\n  prot: 1\ncache:\n  ttl: {chat: 7 dayz}\n",
        {"PROXY__LOG__LEVEL": "loud", "PROXY__NO__SUCH": "1"},
        server__port="x",
        cache__backend="disk",
    )
    assert found == [
        "settings.yaml:2: server.port: expected a whole number from 0 to 65535, found '99999'",
        "settings.yaml:3: server.prot: expected a setting of this section, found an unknown name; did you mean port?",
        "settings.yaml:5: cache.ttl.chat: expected a duration such as 250ms, 30s, 5m, 24h or 7d, found '7 dayz'",
        "environment: PROXY__NO__SUCH: expected a setting of this section, found an unknown name",
        "environment: log.level (PROXY__LOG__LEVEL): expected debug, info, warning or error, found 'loud'",
        "command line: server.port (--port): expected a whole number from 0 to 65535, found 'x'",
        "command line: cache.backend (--cache): expected memory, sqlite, redis or off, found 'disk'",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "sever: {}",
            "settings.yaml:1: sever: expected a setting of this section, found an unknown name; did you mean server?",
        ),
        ("port: 1", "did you mean server.port?"),
        ("backend: off", "did you mean cache.backend or throttle.backend?"),
        ("xyzzy: 1", "found an unknown name"),
        ("server:\nport: 1", "settings.yaml:2: port"),
        ("server: [1]", "settings.yaml:1: server: expected a table of settings, found a list"),
        ("server: x", "server: expected a table of settings, found a single value"),
        ("[a]", "settings.yaml:1: expected a table of settings, found a list"),
        ("server:\n  port:\n", "settings.yaml:2: server.port: expected a whole number from 0 to 65535, found nothing"),
        ("server: {port: [1]}", "server.port: expected a whole number from 0 to 65535, found a list"),
        ("server: {port: {a: 1}}", "found a table"),
        ("server: {allowed_hosts: a}", "server.allowed_hosts: expected a list, each item a host's name"),
        ("server: {allowed_hosts: [a, 'b c']}", "server.allowed_hosts.1: expected a host's name"),
        ("throttle: {limits: [a]}", "throttle.limits: expected a table of a model's name"),
        ("throttle: {limits: {gpt 4: {rpm: 1}}}", "throttle.limits.gpt 4: expected a model's name"),
        ("throttle: {limits: {gpt-4: 5}}", "throttle.limits.gpt-4: expected a table of settings, found a single value"),
        (
            "throttle: {limits: {gpt-4: {rpm: -1}}}",
            "throttle.limits.gpt-4.rpm: expected a whole number of at least 1, found '-1'",
        ),
        (
            "cache: {ignore_fields: [user, messages]}",
            "cache.ignore_fields: expected fields that do not change the answer, found messages",
        ),
        ("cost: {prices: {gpt-x: {output: 1}}}", "cost.prices.gpt-x: expected at least an input price, found none"),
        (
            "cost: {prices: {gpt-x: {in: 1}}}",
            "cost.prices.gpt-x.in: expected input, cached_input, cache_write, output, audio_input, cached_audio_input, "
            "audio_output, image_input, cached_image_input, image_output, web_search or file_search, found 'in'",
        ),
        ("cost: {prices: {gpt-x: {input: -1}}}", "cost.prices.gpt-x.input: expected an amount in USD"),
        ("retry: {fallbacks: {a: []}}", "retry.fallbacks.a: expected at least 1 of"),
        ("server: {port: 1}\nserver: {port: 1}", "settings.yaml:2: server: expected each name once"),
        ("server: {port: '${PORT}'}", "server.port: expected the environment variable PORT, found that it is not set"),
        ("server: {port: '${PORT'}", "expected ${NAME} or ${NAME:-default}"),
        ("server: {port: '${9}'}", "expected ${NAME} or ${NAME:-default}"),
        ("server: {port: '${SET}'}", "found '${SET}'"),
        ("server: {port: '${KEY}'}", "found something else (not shown)"),
        ("server: {port: sk-abcdef}", "found something else (not shown)"),
        ("server: {sk-abcdef: 1}", "server.(not shown): expected a setting"),
    ],
)
def test_mistakes(load: Load, text: str, expected: str) -> None:
    found = problems(load, text, {"SET": "value", "KEY": "sk-abcdef"})
    assert len(found) == 1
    assert expected in found[0]
    assert "sk-abcdef" not in found[0]


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "server:\n", "server: ~\ncache:\n  ttl:\n", "---\n{}\n", "\ufeffserver: {}"]
)
def test_empty_sections_are_fine(load: Load, text: str) -> None:
    assert load(text).settings == Settings()


def test_variables(load: Load) -> None:
    text = "server: {port: '${PORT}', host: '${HOST:-localhost}', socket: '${SOCKET:-}', max_body: '${N}MiB'}\n"
    text += "log: {level: '${L:-info}'}"
    server = load(text, {"PORT": "9", "N": "2", "L": ""}).settings.server
    assert (server.port, server.host, server.socket, server.max_body) == (9, "localhost", None, 2 * 2**20)


def test_anything_nullable_takes_nothing(load: Load) -> None:
    text = "server: {socket: , ops: null, admin_key: ~, allowed_hosts: }\n"
    text += "throttle: {tier: , max_wait: auto}\nredis: {url: }"
    settings = load(text).settings
    assert settings == replace(Settings(), throttle=replace(Settings().throttle, max_wait=None))


def test_mistakes_that_a_stronger_source_hides_still_count(load: Load) -> None:
    assert len(problems(load, "server: {port: x}", server__port=9)) == 1


def test_a_named_file_must_be_there(load: Load, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(Path("none.yaml"), {}, {}, tmp_path)
    assert str(error.value) == "none.yaml: expected a settings file, found none"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin").write_bytes(b"server: {socket: \xe9}")
    write(tmp_path / "huge", "#" * 300_000)
    for name, expected in (("folder", "readable"), ("latin", "UTF-8"), ("huge", "256 KiB")):
        with pytest.raises(SettingsError) as error:
            load_settings(tmp_path / name, {}, {}, tmp_path)
        assert [expected in str(problem) for problem in error.value.problems] == [True]


# ./config.yaml, which nobody named


def test_a_file_found_by_itself_is_read_if_it_has_our_sections(load: Load) -> None:
    loaded = load("server: {port: 9}", automatic=True)
    assert (loaded.settings.server.port, loaded.file) == (9, Path("config.yaml"))
    assert loaded.sources["server.port"] == "config.yaml:1"


@pytest.mark.parametrize("text", ["app: {port: 1}", "", "- a", "{{ template }}", "  server: x"])
def test_a_file_found_by_itself_without_our_sections_is_not_read(load: Load, text: str) -> None:
    loaded = load(text, automatic=True)
    assert (loaded.settings, loaded.file) == (Settings(), None)
    assert len(loaded.warnings) == 1


def test_a_file_found_by_itself_with_our_sections_must_be_valid(load: Load) -> None:
    assert problems(load, "server: {prot: 9}", automatic=True)[0].startswith("config.yaml:1: server.prot:")


FOREIGN = "upstreams:\n- base_url: {url}\n  keys:\n  - {key}\n"


@pytest.mark.parametrize(
    ("url", "key", "refused"),
    [
        ("https://api.openai.com/v1", "${K}", False),
        ("https://name.openai.azure.com", "${K}", False),
        ("https://evil.example/v1", "${K}", True),
        ("https://openai.azure.com.evil.example/v1", "${K}", True),
        ("http://127.0.0.1:9/v1", "${K}", True),
        ("https://evil.example/v1", "{name: a, key: '${K}'}", True),
        ("https://evil.example/v1", "{key: own, project: '${K}'}", True),
        ("https://evil.example/${K}/v1", "own", True),
        ("https://gateway.example/v1", "own", False),
        ("${URL}", "own", False),
        ("${URL}", "${K}", True),
        ("https://gateway.example/v1", "{key_file: inside}", False),
        ("https://evil.example/v1", "{key_file: ../outside}", True),
        ("https://api.openai.com/v1", "{key_file: ../outside}", False),
    ],
)
def test_a_file_found_by_itself_does_not_send_keys_to_foreign_hosts(
    tmp_path: Path, url: str, key: str, refused: bool
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    write(folder / "inside", "inside-key")
    write(tmp_path / "outside", "outside-key")
    write(folder / "config.yaml", FOREIGN.format(url=url, key=key))
    environ = {"K": "env-key", "URL": "https://mine.example/v1"}
    try:
        load_settings(None, {}, environ, folder)
        found = []
    except SettingsError as error:
        found = [str(problem) for problem in error.problems]
    assert bool(found) is refused
    assert all("config.yaml:2: upstreams.0.base_url: a file that sends keys" in line for line in found)
    load_settings(Path("config.yaml"), {}, environ, folder)  # named, it may
    if "${URL}" not in url:
        load_settings(None, {"upstream": "https://mine.example/v1"}, environ, folder)  # the user named the host


def test_a_file_found_by_itself_with_broken_upstreams(load: Load) -> None:
    assert (
        len(problems(load, "upstreams:\n- x\n- keys: ['${K}']\n  base_url: https://a/v1", {"K": "k"}, automatic=True))
        == 1
    )
    assert len(problems(load, "upstreams:\n- kind: azure\n  keys: ['${K}']", {"K": "k"}, automatic=True)) == 1
    assert len(problems(load, "upstreams: x", automatic=True)) == 1


# --upstream


def test_the_upstream_flag_moves_the_only_upstream(load: Load) -> None:
    text = "upstreams:\n- {name: mine, base_url: 'https://a/v1', keys: [abc], models: [x]}"
    loaded = load(text, {"OPENAI_API_KEY": "sk-a"}, upstream="https://b.example/v1/")
    (upstream,) = loaded.settings.upstreams
    assert (upstream.name, upstream.base_url, upstream.models) == ("mine", "https://b.example/v1", ("x",))
    assert [key.secret.reveal() for key in upstream.keys] == ["abc"]
    assert loaded.sources["upstreams.0.base_url"] == "flag --upstream"


@pytest.mark.parametrize(
    ("url", "kind", "base_url", "keys"),
    [
        ("https://b.example/v1", "openai", "https://b.example/v1", ["sk-a", "sk-b"]),
        ("http://127.0.0.1:9", "openai", "http://127.0.0.1:9", ["sk-a", "sk-b"]),
        ("https://n.openai.azure.com/openai", "azure", "https://n.openai.azure.com", ["az"]),
        ("https://n.cognitiveservices.azure.com", "azure", "https://n.cognitiveservices.azure.com", ["az"]),
    ],
)
def test_the_upstream_flag_takes_the_environments_keys(
    load: Load, url: str, kind: str, base_url: str, keys: list[str]
) -> None:
    environ = {
        "OPENAI_API_KEY": "sk-a,sk-b",
        "AZURE_OPENAI_API_KEY": "az",
        "AZURE_OPENAI_ENDPOINT": "https://other.openai.azure.com",
        "OPENAI_API_BASE": "https://elsewhere/v1",
    }
    (upstream,) = load(None, environ, upstream=url).settings.upstreams
    assert (upstream.kind, upstream.base_url) == (kind, base_url)
    assert [key.secret.reveal() for key in upstream.keys] == keys


def test_the_upstream_flag_alone(load: Load) -> None:
    for url in ("http://127.0.0.1:9/v1", "https://n.openai.azure.com"):
        loaded = load(None, {}, upstream=url)
        assert loaded.settings.upstreams[0].base_url == url
        assert loaded.settings.passthrough


def test_the_upstream_flag_does_not_choose_among_several(load: Load) -> None:
    text = "upstreams:\n- {base_url: 'https://a/v1', name: a}\n- {base_url: 'https://b/v1', name: b}"
    assert problems(load, text, upstream="https://c/v1") == [
        "command line: upstreams (--upstream): expected a single upstream for it to move, found 2 in the settings"
    ]
    assert len(problems(load, "upstreams: [x]", upstream="https://c/v1")) == 1
    found = problems(load, None, upstream="https://u:hunter2@c/v1")
    assert found == [
        "command line: upstreams.0.base_url (--upstream): expected a base URL without user and password, found one "
        "(keys go under keys:)"
    ]


def test_upstreams_can_be_left_out_altogether(load: Load) -> None:
    text = "server: {port: 9}\nupstreams:\n- {base_url: nonsense, keys: ['${NOPE}']}"
    loaded = load(text, {"OPENAI_API_KEY": "sk-your-key"}, use_upstreams=False, upstream="nonsense")
    assert loaded.settings == replace(Settings(), server=replace(Settings().server, port=9))
