"""Settings become machinery: keys, upstreams, identities, and the label of who has no key."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from proxy.cache.plan import endpoint_ttl
from proxy.config.limits import Limits
from proxy.config.secret import Secret
from proxy.config.settings import (
    CacheSettings,
    CostSettings,
    KeySettings,
    RedisSettings,
    Settings,
    ThrottleSettings,
    UpstreamSettings,
)
from proxy.cost.usage import Usage
from proxy.server.access import partition_of_credential
from proxy.services import Services, build_services
from proxy.system.clock import SYSTEM_CLOCK
from proxy.upstream.target import CLIENTS_KEY


def key(name: str, **fields: object) -> KeySettings:
    return replace(KeySettings(name, Secret(f"sk-{name}"), quota=name), **fields)  # type: ignore[arg-type]


def services(*upstreams: UpstreamSettings, **sections: object) -> Services:
    return build_services(replace(Settings(upstreams=upstreams or (UpstreamSettings(),)), **sections), SYSTEM_CLOCK)  # type: ignore[arg-type]


def test_the_keys_of_all_upstreams_form_one_pool() -> None:
    first = UpstreamSettings("first", keys=(key("a", organization="org", project="proj", weight=2.0), key("b")))
    second = UpstreamSettings("second", kind="azure", models=("gpt-4*",), priority=1, keys=(key("c", quota="shared"),))
    made = services(first, second)
    assert [(k.label, k.upstream, k.priority, k.quota, k.weight, k.models) for k in made.pool.keys] == [
        ("a", 0, 0, "a", 2.0, ("*",)),
        ("b", 0, 0, "b", 1.0, ("*",)),
        ("c", 1, 1, "shared", 1.0, ("gpt-4*",)),
    ]
    assert dict(made.credentials["a"]) == {
        "Authorization": "Bearer sk-a",
        "OpenAI-Organization": "org",
        "OpenAI-Project": "proj",
    }
    assert dict(made.credentials["c"]) == {"api-key": "sk-c"}
    assert [site.name for site in made.addresses] == ["first", "second"]
    assert not made.passthrough
    assert made.masker.mask(b"sk-a, sk-b and sk-c") == b"***, *** and ***"


def test_without_keys_the_proxy_is_pass_through() -> None:
    made = services()
    assert made.passthrough
    assert [k.label for k in made.pool.keys] == [CLIENTS_KEY]
    assert made.credentials == {CLIENTS_KEY: ()}
    several = services(UpstreamSettings("a"), UpstreamSettings("b"))
    assert [k.label for k in several.pool.keys] == ["a", "b"]


def test_an_upstream_without_keys_among_others_is_called_without_a_credential() -> None:
    made = services(
        UpstreamSettings("openai", keys=(key("a"),)), UpstreamSettings("local", base_url="http://127.0.0.1:11434/v1")
    )
    assert not made.passthrough
    assert made.credentials["local"] == ()


def test_no_secret_is_in_repr() -> None:
    shown = repr(services(UpstreamSettings(keys=(key("a"),)), redis=Settings().redis).settings)
    assert "sk-a" not in shown
    assert "***" in shown


def test_the_store_is_disabled_if_it_is_not_used() -> None:
    assert services().store.enabled
    assert not services(cache=CacheSettings(backend="off")).store.enabled
    assert not services(cache=CacheSettings(when="never")).store.enabled


def test_a_slower_store_stands_behind_memory_and_nothing_is_opened_yet(tmp_path: Path) -> None:
    path = tmp_path / "answers" / "cache.db"
    url = Secret("redis://127.0.0.1:1/0")
    for made, kind in (
        (services(cache=CacheSettings(backend="sqlite", path=str(path))), "SQLiteStore"),
        (services(cache=CacheSettings(backend="redis"), redis=RedisSettings(url=url)), "RedisStore"),
        (services(), "NoneType"),
    ):
        assert type(made.store.slower).__name__ == kind
    assert not path.parent.exists()


def test_limits_and_ttls_are_those_of_the_settings() -> None:
    made = services(
        throttle=ThrottleSettings(limits={"*": Limits(rpm=10)}, use=0.5, max_queue=7),
    )
    allowance = made.pool.rate_limiter(made.pool.keys[0], "m", 0.0)
    assert allowance is not None
    assert allowance.usage(0.0)["rpm"]["limit"] == 5
    assert [
        endpoint_ttl(made.settings.cache, name)
        for name in ("chat", "completions", "responses", "embeddings", "moderations")
    ] == [
        86400,
        86400,
        86400,
        604800,
        86400,
    ]


def test_an_upstreams_prices_replace_common_ones() -> None:
    common = {"m-*": {"input": Decimal(1)}, "n": {"input": Decimal(3)}}
    made = services(
        UpstreamSettings("a", prices={"m-*": {"input": Decimal(2)}}),
        UpstreamSettings("b"),
        cost=CostSettings(prices=common),
    )

    def usd(index: int, model: str) -> Decimal:
        cost = made.upstreams[index].prices.cost("openai", [model], Usage(1_000_000, 0, 1_000_000))
        assert cost is not None
        return cost.usd

    assert (usd(0, "m-1"), usd(0, "n"), usd(1, "m-1")) == (Decimal(2), Decimal(3), Decimal(1))


def test_the_cache_identity_is_that_of_the_first_upstream_of_the_lowest_priority() -> None:
    openai = UpstreamSettings("openai", base_url="https://a.test/v1", keys=(key("a"),))
    azure = UpstreamSettings(
        "azure",
        kind="azure",
        base_url="https://b.test",
        models=("gpt-4o",),
        api_version="2024-10-21",
        deployments={"gpt-4o": "mine"},
        keys=(key("b"),),
    )
    first = "openai https://a.test/v1"
    made = services(openai, azure)
    assert made.identities.of("o1", "openai") == made.identities.of("gpt-4o", "openai") == first
    assert made.identities.of("gpt-4o", "openai") is made.identities.of("gpt-4o", "openai")  # worked out once
    assert services(openai).identities.of("gpt-4o", "openai") == first  # a further region empties no cache
    assert services(azure, openai).identities.of("gpt-4o", "openai") == "azure https://b.test 2024-10-21 mine"
    assert services(replace(azure, priority=1), openai).identities.of("gpt-4o", "openai") == first
    assert services(replace(azure, cache_as="x"), openai).identities.of("gpt-4o", "openai") == "x"
    assert services(azure).identities.of("o1", "openai") == ""


def test_remembered_identities_are_bounded() -> None:
    made = services()
    known = made.identities.of("gpt-4o", "openai")
    for number in range(10_000):
        made.identities.of(f"model-{number}", "openai")
    assert len(made.identities._known) <= 4096
    assert made.identities.of("gpt-4o", "openai") == known


def test_cache_partitions_of_pass_through_clients() -> None:
    """Each credential has its own; neither it nor its parts can be read off, or be joined to look like another."""
    scopes = [
        partition_of_credential("bearer", "sk-a", "", ""),
        partition_of_credential("api-key", "sk-a", "", ""),
        partition_of_credential("bearer", "sk-a", "org", ""),
        partition_of_credential("bearer", "sk-a", "", "org"),
        partition_of_credential("bearer", "sk-ab", "", ""),
        partition_of_credential("none", "", "", ""),
    ]
    assert len(set(scopes)) == len(scopes)
    assert scopes[0] == partition_of_credential("bearer", "sk-a", "", "")
    assert "sk-a" not in "".join(scopes)
