from __future__ import annotations

import pytest

from tests.config.kit import Load, problems


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
