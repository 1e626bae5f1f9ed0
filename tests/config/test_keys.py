from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from proxy.config.limits import Limits
from proxy.config.secret import Secret
from proxy.config.settings import KeySettings
from tests.config.kit import Load, problems, write


def pool(load: Load, keys: str, **environ: str) -> tuple[KeySettings, ...]:
    return load(f"upstreams:\n- keys: {keys}", environ).settings.upstreams[0].keys


def plain(keys: tuple[KeySettings, ...]) -> list[tuple[str, str]]:
    return [(key.label, key.secret.reveal()) for key in keys]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("", []),
        ("[]", []),
        ("abc", [("openai-1", "abc")]),
        ("\n  - ${ONE}", [("openai-1", "sk-1")]),
        ("\n  - ${POOL}", [("openai-1", "sk-a"), ("openai-2", "sk-b"), ("openai-3", "sk-c")]),
        (
            "\n  - ${ONE}\n  - ${POOL}\n  - {name: x, key: last}",
            [("openai-1", "sk-1"), ("openai-2", "sk-a"), ("openai-3", "sk-b"), ("openai-4", "sk-c"), ("x", "last")],
        ),
        ("\n  - {name: team, key: '${POOL}'}", [("team-1", "sk-a"), ("team-2", "sk-b"), ("team-3", "sk-c")]),
        ("\n  - {key: '${POOL}', quota: q}", [("openai-1", "sk-a"), ("openai-2", "sk-b"), ("openai-3", "sk-c")]),
        ("\n  - {name: a, key: abc}", [("a", "abc")]),
        ("\n  - ${NOPE:-}\n  - ${NOPE:-abc}", [("openai-1", "abc")]),
        ("\n  - {name: a, key: ' abc '}", [("a", "abc")]),
    ],
)
def test_ways_to_write_keys(load: Load, keys: str, expected: list[tuple[str, str]]) -> None:
    assert plain(pool(load, keys, ONE="sk-1\n", POOL=" sk-a, sk-b ,,sk-c,")) == expected


def test_what_belongs_to_a_key(load: Load) -> None:
    keys = pool(
        load, "\n  - {name: a, key: abc, organization: org-1, project: proj_1, quota: q, limits: {rpm: 5}}\n  - def"
    )
    assert keys == (
        KeySettings("a", Secret("abc"), "org-1", "proj_1", quota="q", limits={"*": Limits(rpm=5)}),
        KeySettings("openai-2", Secret("def"), quota="openai-2"),
    )
    named = pool(load, "\n  - {name: t, key: 'a1,b2', organization: org-1, quota: q, limits: {gpt-*: {tpm: 7}}}")
    assert [(key.label, key.organization, key.quota) for key in named] == [("t-1", "org-1", "q"), ("t-2", "org-1", "q")]
    assert named[0].limits == {"gpt-*": Limits(tpm=7)}
    assert pool(load, "[{key: abc, limits: {}}]")[0].limits == {}


def test_a_key_file_stands_where_a_key_may(load: Load, tmp_path: Path) -> None:
    write(tmp_path / "k", "sk-file\n")
    write(tmp_path / "loose", "sk-loose,sk-more", 0o644)
    assert plain(pool(load, "[{key_file: k}]")) == [("openai-1", "sk-file")]
    loaded = load(f"upstreams:\n- keys: [{{key_file: {tmp_path / 'loose'}}}]")
    assert plain(loaded.settings.upstreams[0].keys) == [("openai-1", "sk-loose"), ("openai-2", "sk-more")]
    assert [f"{tmp_path / 'loose'} may be read by other users" in warning for warning in loaded.warnings] == [True]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("[${}]", "needs quotes"),
        (
            "\n  - ${NOPE}",
            "settings.yaml:3: upstreams.0.keys.0: expected the environment variable NOPE, found that it is not set",
        ),
        ("\n  - ${EMPTY}", "upstreams.0.keys.0: expected a key, found an empty text"),
        ("\n  -", "upstreams.0.keys.0: expected a key, found nothing"),
        ("\n  - [a]", "expected a key, or a table with key, key_file or key_command; found a list"),
        ("\n  - {name: a}", "expected one of key, key_file and key_command, found none"),
        ("\n  - {key: abc, key_file: x}", "expected one of key, key_file and key_command, found several"),
        ("\n  - {key_file: missing}", "expected a readable file, found at"),
        (
            "\n  - {key: hunter2, nmae: x}",
            "upstreams.0.keys.0.nmae: expected a setting of this section, found an unknown name; did you mean name?",
        ),
        ("\n  - {key: hunter2, name: 'a b'}", "upstreams.0.keys.0.name: expected a name"),
        ("\n  - {key: hunter2, organization: 'a b'}", "upstreams.0.keys.0.organization: expected an id"),
        ("\n  - {key: hunter2, limits: {rpm: 1, gpt-4: {rpm: 1}}}", "keys.0.limits.rpm: expected a table"),
        ("\n  - {key: hunter2, limits: 5}", "keys.0.limits: expected a table"),
        (
            "\n  - hunter2\n  - {name: mine, key: 'hunter 2'}",
            "upstreams.0.keys.1: expected a key, found that the key mine contains white space",
        ),
        ("\n  - hunter2,'hunter3'", "the key openai-2 contains a quote"),
        ("\n  - hünter2", "the key openai-1 contains a character that is not ASCII"),
        ('\n  - "hunter2\\x01"', "the key openai-1 contains a control character"),
        ("\n  - sk-your-key", "the key openai-1 is a placeholder"),
        ("\n  - $OPENAI_API_KEY", "the key openai-1 is a placeholder"),
        (
            "\n  - hunter2\n  - hunter2",
            "settings.yaml:4: upstreams.0.keys.1: expected different keys, found that openai-2 is the same as openai-1",
        ),
        (
            "\n  - {name: a, key: hunter2}\n  - {name: a, key: hunter3}",
            "upstreams.0.keys.1: expected a key's name of its own, found a again",
        ),
        ("\n  - hunter2\n  - {name: openai-1, key: hunter3}", "found openai-1 again"),
        (
            "\n  - {key: a, quota: q, limits: {rpm: 1}}\n  - {key: b}\n  - {key: c, quota: q, limits: {tpm: 2}}",
            "upstreams.0.keys.2.limits: expected the limits of openai-1, which has the same quota, found others",
        ),
    ],
)
def test_mistakes(load: Load, keys: str, expected: str) -> None:
    found = problems(load, f"upstreams:\n- keys: {keys}", {"EMPTY": ""})
    assert len(found) == 1
    assert expected in found[0]
    assert "hunter" not in found[0]


CLIENTS = "server:\n  client_keys:\n"


def test_client_keys(load: Load, tmp_path: Path) -> None:
    write(tmp_path / "k", "from-a-file-0123456789\n")
    digest = hashlib.sha256(b"hashed").hexdigest()
    text = (
        f"{CLIENTS}  - {{name: alice, key: '${{A}}', namespace: team}}\n  - {{key_file: k}}\n"
        f"  - {{name: carol, key_sha256: {digest.upper()}}}\n"
    )
    loaded = load(text, {"A": "alices-key-0123456789"})
    assert [(client.name, client.namespace) for client in loaded.settings.server.client_keys] == [
        ("alice", "team"), ("client-2", None), ("carol", None),
    ]  # fmt: skip
    assert [client.digest for client in loaded.settings.server.client_keys] == [
        hashlib.sha256(key).digest() for key in (b"alices-key-0123456789", b"from-a-file-0123456789", b"hashed")
    ]
    assert "alices" not in repr(loaded)
    assert digest not in repr(loaded)


def test_short_client_keys_are_a_warning(load: Load) -> None:
    warnings = load(f"{CLIENTS}  - {{name: a, key: short}}").warnings
    assert any("the key of a is short" in warning and "short:" in warning for warning in warnings)
    assert load("server: {client_keys: }").settings.server.client_keys == ()


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("- hunter2", "server.client_keys.0: expected a table with name and key, found a single value"),
        ("- {name: a}", "expected one of key, key_file and key_command, found none"),
        (
            "- {name: a, key: hunter2, key_sha256: " + "0a" * 32 + "}",
            "expected one of key, key_file, key_command and key_sha256, found several",
        ),
        (
            "- {name: a, key_sha256: hunter2}",
            "server.client_keys.0.key_sha256: expected a SHA-256 of 64 hex digits, found something else (not shown)",
        ),
        ("- {name: a, key: hunter 2}", "found that the key of a contains white space"),
        ("- {name: a, key: changeme}", "found that the key of a is a placeholder"),
        (
            "- {name: a, key: hunter2}\n  - {name: a, key: hunter3}",
            "settings.yaml:4: server.client_keys.1: expected a name of its own, found a again",
        ),
        (
            "- {name: a, key: hunter2}\n  - {name: b, key: hunter2}",
            "expected a key of its own, found that b has another client's",
        ),
        ("- {name: a, key: hunter2, namespace: 'a b'}", "server.client_keys.0.namespace: expected 1 to 128 visible"),
    ],
)
def test_client_key_mistakes(load: Load, item: str, expected: str) -> None:
    found = problems(load, f"{CLIENTS}  {item}")
    assert len(found) == 1
    assert expected in found[0]
    assert "hunter" not in found[0]


def test_client_keys_are_a_list(load: Load) -> None:
    assert "expected a list of client keys, found a table" in problems(load, "server: {client_keys: {a: b}}")[0]


def test_the_admin_key(load: Load, tmp_path: Path) -> None:
    write(tmp_path / "k", "file-key")
    for text, environ in (
        ("{admin_key: file-key}", {}),
        ("{admin_key: {key: file-key}}", {}),
        ("{admin_key: {key_file: k}}", {}),
        ("{admin_key: '${A}'}", {"A": "file-key"}),
        ("{}", {"PROXY__SERVER__ADMIN_KEY": "file-key"}),
        ("{}", {"PROXY__SERVER__ADMIN_KEY": "'file-key'"}),
        ("{}", {"PROXY__SERVER__ADMIN_KEY": "{key_file: k}"}),
    ):
        assert load(f"server: {text}", environ).settings.server.admin_key == Secret("file-key")
    for text in ("hunter 2", "{key: hunter2, kye: x}", "{}", "[hunter2]", "<hunter2>"):
        found = problems(load, f"server: {{admin_key: {text}}}")
        assert len(found) == 1
        assert "hunter" not in found[0]
