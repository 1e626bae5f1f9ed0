"""How every setting is read: the table that goes with the values in `settings.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from .keys import LIMITS_BY_GLOB, AdminKey, ClientKeys
from .problems import Invalid
from .reading import ListOf, MapByGlob, Reader, Reading, Section, Single
from .settings import (
    BreakerSettings,
    BudgetSettings,
    CacheSettings,
    CostSettings,
    LedgerSettings,
    LogSettings,
    RedisSettings,
    RetrySettings,
    ServerSettings,
    Settings,
    ThrottleSettings,
    TimeoutSettings,
    TtlSettings,
)
from .tree import Node
from .upstreams import PRICES, Upstreams
from .values import (
    ALLOWED_HOST,
    BOOLEAN,
    FIELD,
    GLOB,
    HOST,
    HOST_AND_PORT,
    MONEY,
    NAME,
    ORIGIN,
    PATH,
    SECRET,
    SHARE,
    SOCKET_PATH,
    choice,
    duration,
    duration_or_auto,
    integer,
    number,
    optional,
    size,
)

_MILLISECOND: Final = 0.001
_ESSENTIAL: Final = frozenset({"model", "messages", "input", "prompt", "instructions", "tools"})


class IgnoreFields(ListOf[str]):
    """Fields that do not count in the cache key; never those that make the question."""

    def read(self, node: Node, path: str, reading: Reading) -> tuple[str, ...]:
        names = super().read(node, path, reading)
        for name in names:
            if name in _ESSENTIAL:
                raise Invalid(f"expected fields that do not change the answer, found {name}")
        return names


SCHEMA: Final[Section[Settings]] = Section(
    Settings,
    {
        "server": Section(
            ServerSettings,
            {
                "host": Single(HOST),
                "port": Single(integer(0, 65535)),
                "workers": Single(integer(1, 256)),
                "max_body": Single(size(1)),
                "max_in_flight": Single(integer(1)),
                "drain_timeout": Single(duration()),
                "drain_delay": Single(duration()),
                "socket": Single(optional(SOCKET_PATH)),
                "ops": Single(optional(HOST_AND_PORT)),
                "client_keys": ClientKeys(),
                "allow_anonymous": Single(BOOLEAN),
                "allowed_hosts": ListOf(ALLOWED_HOST),
                "allowed_origins": ListOf(ORIGIN),
                "admin_key": AdminKey(),
            },
        ),
        "upstreams": Upstreams(),
        "selection": Single(choice("auto", "headroom", "round_robin", "sticky", "weighted")),
        "cache": Section(
            CacheSettings,
            {
                "backend": Single(choice("memory", "sqlite", "redis", "off")),
                "path": Single(PATH),
                "memory_size": Single(size()),
                "max_size": Single(size(1)),
                "max_entry": Single(size(1)),
                "ttl": Section(
                    TtlSettings,
                    {
                        name: Single(duration())
                        for name in ("chat", "completions", "responses", "embeddings", "moderations")
                    },
                ),
                "when": Single(choice("always", "deterministic", "never")),
                "mode": Single(choice("normal", "replay", "refresh")),
                "cassette": Single(optional(PATH)),
                "store_requests": Single(BOOLEAN),
                "ignore_fields": IgnoreFields(FIELD),
                "shared": Single(BOOLEAN),
                "embeddings_per_item": Single(BOOLEAN),
                "stale_while_revalidate": Single(duration()),
                "stale_if_error": Single(duration()),
                "coalesce": Single(BOOLEAN),
                "on_disconnect": Single(choice("cancel", "finish")),
            },
        ),
        "throttle": Section(
            ThrottleSettings,
            {
                "backend": Single(choice("memory", "redis")),
                "limits": LIMITS_BY_GLOB,
                "tier": Single(optional(choice("1", "2", "3", "4", "5", "free"))),
                "use": Single(SHARE),
                "adaptive": Single(BOOLEAN),
                "max_wait": Single(duration_or_auto()),
                "max_queue": Single(integer()),
            },
        ),
        "retry": Section(
            RetrySettings,
            {
                "max_retries": Single(integer(0, 10)),
                "base_delay": Single(duration()),
                "max_delay": Single(duration()),
                "jitter": Single(duration()),
                "budget": Single(number(1.0)),
                "ambiguous": Single(BOOLEAN),
                "fallbacks": MapByGlob(GLOB, ListOf(GLOB, at_least=1)),
            },
        ),
        "breaker": Section(
            BreakerSettings,
            {
                "failures": Single(integer(1)),
                "window": Single(duration(_MILLISECOND)),
                "open_for": Single(duration(_MILLISECOND)),
            },
        ),
        "timeouts": Section(
            TimeoutSettings,
            {name: Single(duration(_MILLISECOND)) for name in ("connect", "first_byte", "idle", "total")},
        ),
        "cost": Section(
            CostSettings,
            {
                "prices": PRICES,
                "stream_usage": Single(choice("inject", "off")),
                "stream_comment": Single(BOOLEAN),
                "budget": Section(
                    BudgetSettings,
                    {
                        "usd_per_day": Single(optional(MONEY)),
                        "usd_per_month": Single(optional(MONEY)),
                        "on_exceeded": Single(choice("refuse", "cache_only")),
                        "warn_at": Single(SHARE),
                    },
                ),
            },
        ),
        "ledger": Section(LedgerSettings, {"path": Single(PATH), "enabled": Single(BOOLEAN)}),
        "redis": Section(RedisSettings, {"url": Single(optional(SECRET)), "prefix": Single(NAME)}),
        "log": Section(
            LogSettings,
            {
                "level": Single(choice("debug", "info", "warning", "error")),
                "format": Single(choice("text", "json")),
            },
        ),
    },
)


def leaves(section: Section[Any] = SCHEMA, prefix: str = "") -> Iterator[tuple[str, Reader[Any]]]:
    """Every setting that is not itself a section: dotted path and reader."""
    for name, reader in section.readers.items():
        if isinstance(reader, Section):
            yield from leaves(reader, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", reader


def _paths_by_name() -> dict[str, tuple[str, ...]]:
    paths: dict[str, tuple[str, ...]] = {}
    for path, _ in leaves():
        name = path.rpartition(".")[2]
        paths[name] = (*paths.get(name, ()), path)
    return paths


KNOWN: Final = _paths_by_name()
"""A setting's bare name -> its paths, for who wrote it into the wrong section."""
