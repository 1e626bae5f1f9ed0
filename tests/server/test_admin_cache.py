"""The routes below `/_proxy/cache`: list, show, purge, export, import, and their errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from proxy.cache.cassette import read_line, write_line
from proxy.cache.entry import Entry
from proxy.cache.stores.interface import StoreError
from proxy.cache.stores.sqlite import SQLiteStore
from proxy.config.secret import Secret
from proxy.config.settings import CacheSettings, ServerSettings
from proxy.system.clock import SYSTEM_CLOCK
from tests.cache.stores import kit
from tests.cache.stores.kit import NOW
from tests.pipeline.fixture import ask, settings
from tests.pipeline.script import says
from tests.server.kit import RunningProxy, running_proxy

pytestmark = pytest.mark.slow

WALL = NOW + 100


def entry(key: str, body: bytes = b'{"a": 1}', **changes: Any) -> Entry:
    """Return an entry that a cassette line can hold."""
    plain: dict[str, Any] = {"headers": ((b"content-type", b"application/json"),), "usage_span": None}
    return kit.entry(key, body, **(plain | changes))


ENTRIES = [
    entry("aa11", tags=("team:ads",)),
    entry("aa11", form="sse", body=b"data: [DONE]\n\n", tags=("team:ads",)),
    entry("aa22", model="gpt-4o-mini", endpoint="completions", stored_at=NOW - 1000, namespace=""),
    entry("bb33", body=b"\xff", answer_model=None, usage=None, cost=None),
]


@pytest.fixture
async def server() -> AsyncIterator[RunningProxy]:
    async with running_proxy(clock=replace(SYSTEM_CLOCK, wall=lambda: WALL)) as built:
        for one in ENTRIES:
            built.services.store.put(one)
        yield built


def left(server: RunningProxy) -> list[str]:
    return sorted(entry.key + entry.form for entry, _ in server.services.store.memory.listed(NAMES))


NAMES = [(one.key, one.form) for one in ENTRIES]


async def purge(server: RunningProxy, document: Any) -> Any:
    answer = await server.ask("POST", "/_proxy/cache/purge", document)
    assert answer.status == 200, answer.body
    return answer.json()


# --- purge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "wanted"),
    [
        ({"all": True}, ["aa11json", "aa11sse", "aa22json", "bb33json"]),
        ({"key": "aa11"}, ["aa11json", "aa11sse"]),
        ({"key": "aa"}, []),
        ({"model": "gpt-4o*"}, ["aa11json", "aa11sse", "aa22json", "bb33json"]),
        ({"model": "*-mini", "endpoint": "comp*"}, ["aa22json"]),
        ({"namespace": "?*"}, ["aa11json", "aa11sse", "bb33json"]),
        ({"tag": "team:a*"}, ["aa11json", "aa11sse"]),
        ({"model": "gpt-4o-mini"}, ["aa22json"]),
        ({"endpoint": "chat"}, ["aa11json", "aa11sse", "bb33json"]),
        ({"namespace": ""}, ["aa22json"]),
        ({"tag": "team:ads"}, ["aa11json", "aa11sse"]),
        ({"older_than": "10m"}, ["aa22json"]),
        ({"older_than": 600}, ["aa22json"]),
        ({"older_than": 0.5, "tag": "run:7"}, ["aa22json", "bb33json"]),
        ({"older_than": "99", "all": False}, ["aa11json", "aa11sse", "aa22json", "bb33json"]),
        ({"prefix": "aa"}, ["aa11json", "aa11sse", "aa22json"]),
    ],
)
async def test_purge_by_each_filter(server: RunningProxy, which: dict[str, Any], wanted: list[str]) -> None:
    before = left(server)
    message = {} if wanted else {"message": "nothing matches: key aa"}
    assert await purge(server, which | {"dry_run": True}) == {"purged": len(wanted), "dry_run": True} | message
    assert left(server) == before
    assert await purge(server, which) == {"purged": len(wanted), "dry_run": False} | message
    assert left(server) == sorted(set(before) - set(wanted))


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b"[]", "invalid_json", None),
        ({}, "invalid_option", "all"),
        ({"dry_run": True}, "invalid_option", "all"),
        ({"all": False}, "invalid_option", "all"),
        ({"all": True, "model": "gpt-4o"}, "invalid_option", "all"),
        ({"all": 1}, "invalid_option", "all"),
        ({"all": True, "dry_run": "yes"}, "invalid_option", "dry_run"),
        ({"models": "gpt-4o"}, "invalid_option", "models"),
        ({"stored_before": 1}, "invalid_option", "stored_before"),
        ({"model": None}, "invalid_option", "model"),
        ({"tag": ["a:b"]}, "invalid_option", "tag"),
        ({"older_than": "a week"}, "invalid_option", "older_than"),
        ({"older_than": -1}, "invalid_option", "older_than"),
        ({"older_than": True}, "invalid_option", "older_than"),
    ],
)
async def test_an_ambiguous_purge_is_refused(server: RunningProxy, body: Any, code: str, param: str | None) -> None:
    before = left(server)
    answer = await server.ask("POST", "/_proxy/cache/purge", body)
    assert (answer.status, answer.error, answer.json()["error"]["param"]) == (400, code, param)
    assert left(server) == before


async def test_what_an_operator_does_is_logged_with_who_and_how_much(
    server: RunningProxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "proxy.operator")
    await purge(server, {"model": "*-mini", "dry_run": True})
    await purge(server, {"model": "*-mini"})
    await purge(server, {"tag": "nobody:*"})
    assert (await server.ask("POST", "/_proxy/limits/reset")).status == 200
    assert (await server.ask("POST", "/_proxy/cache/import", b"")).status == 200
    said = [record.getMessage() for record in caplog.records if record.name == "proxy.operator"]
    assert said[:3] == [
        "purge by 127.0.0.1 with no key: 1 stored response (model *-mini)",
        "purge by 127.0.0.1 with no key: 0 stored responses (tag nobody:*)",
        "limits reset by 127.0.0.1 with no key: all windows of all limits",
    ]
    assert said[3].startswith("import by 127.0.0.1 with no key: 0 ")
    metrics = (await server.ask("GET", "/metrics")).body.decode()
    assert 'openai_proxy_operator_actions_total{action="limits reset"}' in metrics


async def test_a_purged_entry_is_a_miss() -> None:
    async with running_proxy(says(), says()) as server:
        first = await server.ask(body=ask())
        key = first.get("X-Proxy-Cache-Key")
        assert (await server.ask(body=ask())).get("X-Proxy-Cache") == "hit"
        assert await purge(server, {"key": key}) == {"purged": 1, "dry_run": False}
        again = await server.ask(body=ask())
        assert (again.get("X-Proxy-Cache"), again.get("X-Proxy-Cache-Key")) == ("miss", key)


# --- list and show ----------------------------------------------------------------------------------------------------


async def test_an_entry_is_shown_in_all_its_forms(server: RunningProxy) -> None:
    shown = (await server.ask("GET", "/_proxy/cache/aa11")).json()
    assert (shown["key"], [form["form"] for form in shown["forms"]]) == ("aa11", ["json", "sse"])
    form = shown["forms"][0]
    assert form["size"] > 0
    assert {name: form[name] for name in form if name != "size"} == {
        "key": "aa11",
        "form": "json",
        "endpoint": "chat",
        "model": "gpt-4o",
        "answer_model": "gpt-4o-2024-08-06",
        "namespace": "ci",
        "tags": ["team:ads"],
        "stored_at": "2027-01-15T08:00:00Z",
        "age_s": 100,
        "ttl_left_s": 3500,
        "status": 200,
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 20,
            "total_tokens": 30,
            "cached_tokens": 4,
            "cache_write_tokens": 5,
            "heard_tokens": 6,
        },
        "saves_usd": "0.002250",
        "sampled": True,
        "traits": "",
    }
    assert "body" not in form
    shown = (await server.ask("GET", "/_proxy/cache/aa11?body=1")).json()
    assert [form["body"] for form in shown["forms"]] == ['{"a": 1}', "data: [DONE]\n\n"]
    assert (await server.ask("GET", "/_proxy/cache/bb33?body=1")).json()["forms"][0]["body_base64"] == "/w=="


async def test_an_entry_as_cassette_lines(server: RunningProxy) -> None:
    answer = await server.ask("GET", "/_proxy/cache/aa11?cassette=1")
    assert answer.get("Content-Type") == "application/x-ndjson"
    assert [read_line(line).body for line in answer.body.splitlines()] == [b'{"a": 1}', b"data: [DONE]\n\n"]


async def test_an_unknown_key_is_404(server: RunningProxy) -> None:
    answer = await server.ask("GET", "/_proxy/cache/aa")
    assert (answer.status, answer.error) == (404, "unknown_route")
    assert "'aa'" in answer.json()["error"]["message"]
    assert (await server.ask("GET", "/_proxy/cache/")).status == 404


async def test_the_list_has_pages(server: RunningProxy) -> None:
    keys, after = [], ""
    while True:
        page = (await server.ask("GET", f"/_proxy/cache?limit=1&after={after}")).json()
        keys += [one["key"] + one["form"] for one in page["entries"]]
        if not page["next"]:
            break
        after = page["next"].replace("\n", "%0A")
    assert keys == left(server)
    page = (await server.ask("GET", "/_proxy/cache?prefix=aa&older_than=5m&model=gpt-4o-mini")).json()
    assert ([one["key"] for one in page["entries"]], page["next"]) == (["aa22"], "")


@pytest.mark.parametrize(
    ("target", "param"),
    [
        ("?limit=0", "limit"),
        ("?limit=x", "limit"),
        ("?limit=1001", "limit"),
        ("?nothing=1", "nothing"),
        ("?older_than=soon", "older_than"),
        ("/aa11?body=yes", "body"),
        ("/aa11?form=json", "form"),
    ],
)
async def test_invalid_queries_are_400(server: RunningProxy, target: str, param: str) -> None:
    answer = await server.ask("GET", f"/_proxy/cache{target}")
    assert (answer.status, answer.error, answer.json()["error"]["param"]) == (400, "invalid_option", param)


# --- import -----------------------------------------------------------------------------------------------------------


async def test_imported_lines_are_stored(server: RunningProxy) -> None:
    lines = [write_line(entry("new", stored_at=WALL)), write_line(ENTRIES[0]), write_line(entry("old", ttl=1.0))]
    answer = await server.ask("POST", "/_proxy/cache/import", b"".join(lines))
    assert answer.json() == {"new": 1, "replaced": 1, "expired": 1, "refused": 0}
    assert (await server.ask("GET", "/_proxy/cache/new")).status == 200


async def test_an_invalid_line_imports_nothing(server: RunningProxy) -> None:
    answer = await server.ask("POST", "/_proxy/cache/import", write_line(entry("new")) + b"{}\n")
    assert (answer.status, answer.error) == (400, "bad_request")
    assert "line:2: " in answer.json()["error"]["message"]
    assert (await server.ask("GET", "/_proxy/cache/new")).status == 404


# --- access and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/_proxy/cache"),
        ("GET", "/_proxy/cache/aa11"),
        ("POST", "/_proxy/cache/purge"),
        ("POST", "/_proxy/cache/import"),
    ],
)
async def test_cache_pages_need_operator_access(method: str, path: str) -> None:
    config = replace(settings(), server=ServerSettings(admin_key=Secret("the-admin-key")))
    async with running_proxy(config=config) as server:
        for headers in ([], [("Authorization", "Bearer wrong")]):
            assert (await server.ask(method, path, {"all": True}, headers)).status == 401
    async with running_proxy() as server:
        for headers in ([("Origin", "http://evil.test")], [("Sec-Fetch-Site", "cross-site")]):
            assert (await server.ask(method, path, {"all": True}, headers)).status == 403
        assert (await server.ask(method, path, {"all": True}, [("Host", "evil.test")])).status == 421
        other = "POST" if method == "GET" else "GET"
        answer = await server.ask(other, path)
        assert (answer.status, answer.get("Allow")) == (405, "GET, HEAD" if method == "GET" else "POST")


async def test_without_a_cache_the_pages_are_400() -> None:
    async with running_proxy(config=replace(settings(), cache=CacheSettings(backend="off"))) as server:
        answer = await server.ask("POST", "/_proxy/cache/purge", {"all": True})
        assert (answer.status, answer.error) == (400, "bad_request")


async def test_a_failing_store_is_reported(server: RunningProxy) -> None:
    class Broken(SQLiteStore):
        async def fail(self, *_: Any, **__: Any) -> Any:
            raise StoreError("the disk is gone")

        purge = list = read = fail

    server.services.store.slower = Broken("nowhere", 2**20, 2**20)
    for method, path in (("POST", "/purge"), ("GET", ""), ("GET", "/aa11")):
        answer = await server.ask(method, f"/_proxy/cache{path}", {"all": True} if method == "POST" else None)
        assert (answer.status, answer.error) == (500, "internal_error")
        assert "the disk is gone" in answer.json()["error"]["message"]
