"""How every setting is read: the table that goes with the values in `settings.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from .keys import LIMITS_BY_GLOB, AdminKey, ClientKeys
from .problems import Invalid
from .reading import ByGlob, Many, One, Reader, Reading, Section
from .settings import Breaker, Budget, Cache, Cost, Ledger, Log, Redis, Retry, Server, Settings, Throttle, Timeouts, Ttl
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


class IgnoreFields(Many[str]):
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
            Server,
            {
                "host": One(HOST),
                "port": One(integer(0, 65535)),
                "workers": One(integer(1, 256)),
                "max_body": One(size(1)),
                "max_in_flight": One(integer(1)),
                "drain_timeout": One(duration()),
                "drain_delay": One(duration()),
                "socket": One(optional(SOCKET_PATH)),
                "ops": One(optional(HOST_AND_PORT)),
                "client_keys": ClientKeys(),
                "allow_anonymous": One(BOOLEAN),
                "allowed_hosts": Many(ALLOWED_HOST),
                "allowed_origins": Many(ORIGIN),
                "admin_key": AdminKey(),
            },
        ),
        "upstreams": Upstreams(),
        "selection": One(choice("auto", "headroom", "round_robin", "sticky", "weighted")),
        "cache": Section(
            Cache,
            {
                "backend": One(choice("memory", "sqlite", "redis", "off")),
                "path": One(PATH),
                "memory_size": One(size()),
                "max_size": One(size(1)),
                "max_entry": One(size(1)),
                "ttl": Section(
                    Ttl,
                    {
                        name: One(duration())
                        for name in ("chat", "completions", "responses", "embeddings", "moderations")
                    },
                ),
                "when": One(choice("always", "deterministic", "never")),
                "mode": One(choice("normal", "replay", "refresh")),
                "cassette": One(optional(PATH)),
                "store_requests": One(BOOLEAN),
                "ignore_fields": IgnoreFields(FIELD),
                "shared": One(BOOLEAN),
                "embeddings_per_item": One(BOOLEAN),
                "stale_while_revalidate": One(duration()),
                "stale_if_error": One(duration()),
                "coalesce": One(BOOLEAN),
                "on_disconnect": One(choice("cancel", "finish")),
            },
        ),
        "throttle": Section(
            Throttle,
            {
                "backend": One(choice("memory", "redis")),
                "limits": LIMITS_BY_GLOB,
                "tier": One(optional(choice("1", "2", "3", "4", "5", "free"))),
                "use": One(SHARE),
                "adaptive": One(BOOLEAN),
                "max_wait": One(duration_or_auto()),
                "max_queue": One(integer()),
            },
        ),
        "retry": Section(
            Retry,
            {
                "max_retries": One(integer(0, 10)),
                "base_delay": One(duration()),
                "max_delay": One(duration()),
                "jitter": One(duration()),
                "budget": One(number(1.0)),
                "ambiguous": One(BOOLEAN),
                "fallbacks": ByGlob(GLOB, Many(GLOB, at_least=1)),
            },
        ),
        "breaker": Section(
            Breaker,
            {
                "failures": One(integer(1)),
                "window": One(duration(_MILLISECOND)),
                "open_for": One(duration(_MILLISECOND)),
            },
        ),
        "timeouts": Section(
            Timeouts,
            {name: One(duration(_MILLISECOND)) for name in ("connect", "first_byte", "idle", "total")},
        ),
        "cost": Section(
            Cost,
            {
                "prices": PRICES,
                "stream_usage": One(choice("inject", "off")),
                "stream_comment": One(BOOLEAN),
                "budget": Section(
                    Budget,
                    {
                        "usd_per_day": One(optional(MONEY)),
                        "usd_per_month": One(optional(MONEY)),
                        "on_exceeded": One(choice("refuse", "cache_only")),
                        "warn_at": One(SHARE),
                    },
                ),
            },
        ),
        "ledger": Section(Ledger, {"path": One(PATH), "enabled": One(BOOLEAN)}),
        "redis": Section(Redis, {"url": One(optional(SECRET)), "prefix": One(NAME)}),
        "log": Section(
            Log,
            {
                "level": One(choice("debug", "info", "warning", "error")),
                "format": One(choice("text", "json")),
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
