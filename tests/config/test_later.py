from __future__ import annotations

import pytest

from proxy.config import loader
from proxy.config.later import NOT_YET
from proxy.config.schema import leaves
from tests.config.kit import Load, problems


def test_what_is_not_built_is_refused(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is, today: the table is empty."""
    monkeypatch.setattr(loader, "NOT_YET", {"server.workers": (), "server.client_keys.*.limits.usd_per_day": ()})
    assert problems(load, None, server__workers=4) == [
        "command line: server.workers (--workers): '4' is not yet available (usable now: 1)",
    ]
    assert "(PROXY__SERVER__WORKERS)" in problems(load, None, {"PROXY__SERVER__WORKERS": "3"})[0]
    (problem,) = problems(load, "server: {client_keys: [{name: a, key: abc, limits: {usd_per_day: 1}}]}")
    assert problem.startswith("settings.yaml:1: server.client_keys.0.limits.usd_per_day: ")
    assert " is not yet available" in problem


@pytest.mark.parametrize(
    "text",
    [
        "cache: {coalesce: false, on_disconnect: finish, embeddings_per_item: false, backend: off}",
        "throttle: {adaptive: false}",
        "ledger: {enabled: false}",
        "selection: headroom",
        "selection: round_robin",
        "upstreams: [{keys: [{key: abc, weight: 1}], proxy: , entra_id: false}]",
        "server: {client_keys: [{name: a, key: abc, models: [], limits: {}}]}",
        "cost: {budget: {}}",
    ],
)
def test_what_only_switches_off_is_kept(load: Load, text: str) -> None:
    assert problems(load, text) == []


def test_a_redis_url_of_the_environment_alone_is_no_mistake(load: Load) -> None:
    environ = {"REDIS_URL": "redis://a"}
    assert problems(load, "redis: {url: '${REDIS_URL:-}'}", environ) == []
    assert problems(load, None, environ) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cache: {backend: redis}", "settings.yaml:1: cache.backend: expected redis.url"),
        ("throttle: {backend: redis}", "settings.yaml:1: throttle.backend: expected redis.url"),
        (
            "throttle: {backend: redis}\nredis: {url: 'http://a:hunter2@b'}",
            "settings.yaml:2: redis.url: expected redis://",
        ),
        (
            "cache: {backend: redis}\nredis: {url: 'http://a:hunter2@b'}",
            "settings.yaml:2: redis.url: expected redis://",
        ),
        (
            f"cache: {{backend: redis}}\nredis: {{url: 'redis://a', prefix: {'p' * 65}}}",
            "settings.yaml:2: redis.prefix: ",
        ),
    ],
)
def test_a_cache_in_redis_needs_an_address(load: Load, text: str, found: str) -> None:
    (problem,) = problems(load, text)
    assert problem.startswith(found)
    assert "hunter2" not in problem
    assert problems(load, "cache: {backend: redis}\nredis: {url: 'rediss://a:6380/1'}") == []


def test_every_line_of_the_table_is_a_setting() -> None:
    inner = ("server.admin_key.", "server.client_keys.*.", "upstreams.*.")
    assert {path for path in NOT_YET if not path.startswith(inner)} <= {path for path, _ in leaves()}
