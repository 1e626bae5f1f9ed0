from __future__ import annotations

import pytest

from proxy.config.later import NOT_YET
from proxy.config.schema import leaves
from tests.config.kit import Load, problems

REFUSED = {
    "server.client_keys.*.limits.usd_per_day": "server: {client_keys: [{name: a, key: abc, limits: {usd_per_day: 1}}]}",
    "cost.budget.usd_per_day": "cost: {budget: {usd_per_day: 5}}",
    "cost.budget.usd_per_month": "cost: {budget: {usd_per_month: 5}}",
    "cost.budget.on_exceeded": "cost: {budget: {on_exceeded: cache_only}}",
    "cost.budget.warn_at": "cost: {budget: {warn_at: 0.5}}",
}


@pytest.mark.parametrize("path", NOT_YET)
def test_what_is_not_built_is_refused(load: Load, path: str) -> None:
    (problem,) = problems(load, REFUSED[path])
    assert problem.startswith(f"settings.yaml:1: {path.replace('*', '0')}: ")
    assert " is not yet available" in problem
    assert "hunter2" not in problem


def test_what_can_be_used_instead_is_said(load: Load) -> None:
    (problem,) = problems(load, "cost: {budget: {warn_at: 0.5}}")
    assert problem.endswith("'0.5' is not yet available (usable now: 0.8)")
    assert "(PROXY__COST__BUDGET__WARN_AT)" in problems(load, None, {"PROXY__COST__BUDGET__WARN_AT": "0.5"})[0]


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
