"""Rules over several settings, and warnings about what is allowed but risky."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from .problems import Invalid
from .reading import Reading
from .settings import Settings, UpstreamSettings
from .urls import Url, parse_url
from .values import LONGEST_SOCKET_PATH, is_loopback

LONGEST_REDIS_PREFIX: Final = 64
"""Bytes; longer ones would make keys in Redis longer than 160 bytes."""


def check(settings: Settings, reading: Reading) -> None:
    """Add to the reading's problems and warnings. Values that could not be read are left out."""
    _check_exposure(settings, reading)
    _check_socket(settings, reading)
    _check_ops(settings, reading)
    _check_redis(settings, reading)
    _check_mode(settings, reading)
    _check_budgets(settings, reading)
    _warn_workers(settings, reading)
    if settings.cache.shared and len(settings.server.client_keys) > 1:
        reading.warn("cache.shared: clients with different keys read each other's answers")


def _check_redis(settings: Settings, reading: Reading) -> None:
    backends = {"cache.backend": settings.cache.backend, "throttle.backend": settings.throttle.backend}
    naming = next((path for path, backend in backends.items() if backend == "redis"), None)
    if naming is None or not reading.sound(*backends, "redis.url"):
        return
    url = settings.redis.url
    if url is None:
        reading.fail_at(naming, "expected redis.url (or REDIS_URL) to go with redis, found none")
    else:
        from ..system.redis import check_url  # loads the driver, so only if Redis is used

        try:
            check_url(url.reveal())
        except ValueError as error:
            reading.fail_at("redis.url", str(error))
    if len(settings.redis.prefix.encode()) > LONGEST_REDIS_PREFIX:
        reading.fail_at("redis.prefix", f"expected at most {LONGEST_REDIS_PREFIX} bytes, found more")


def _check_budgets(settings: Settings, reading: Reading) -> None:
    """Warn of what a budget without a ledger does not know."""
    budget, shared = settings.cost.budget, settings.throttle.backend == "redis"
    limited = budget.usd_per_day is not None or budget.usd_per_month is not None
    if not limited and all(client.usd_per_day is None for client in settings.server.client_keys):
        return
    if settings.ledger.enabled or shared or not reading.sound("ledger.enabled", "server.workers", "throttle.backend"):
        return
    reading.warn("budgets without a ledger count from the start of the proxy: a restart forgets what was spent")
    if settings.server.workers > 1:
        workers = settings.server.workers
        reading.warn(f"budgets without a ledger: each of the {workers} workers may spend the whole budget")


def _warn_workers(settings: Settings, reading: Reading) -> None:
    """Warn of what each of several workers has for itself."""
    workers, cache = settings.server.workers, settings.cache
    if workers == 1 or cache.backend == "redis" or not reading.sound("server.workers", "cache.backend"):
        return
    start = f"server.workers: each of the {workers} workers"
    if cache.backend == "memory":
        reading.warn(
            f"{start} keeps answers of its own, up to cache.memory_size each, and does not see those of the others; "
            "cache.backend sqlite or redis is one for all"
        )
    if cache.coalesce and cache.backend != "off":
        reading.warn(
            f"{start} joins identical requests at the same time for itself: there may be as many upstream calls; "
            "with cache.backend redis it is one"
        )


def _check_mode(settings: Settings, reading: Reading) -> None:
    cache = settings.cache
    if not reading.sound("cache.backend", "cache.mode", "cache.cassette", "cache.when"):
        return
    setting = "cache.cassette" if cache.cassette is not None else "cache.mode"
    if (cache.cassette is not None or cache.mode == "replay") and (cache.backend == "off" or cache.when == "never"):
        why = "backend: off" if cache.backend == "off" else "when: never"
        reading.fail_at(setting, f"expected a cache to go with it, found {why}")
    elif cache.mode == "replay" and cache.cassette is None and cache.backend == "memory":
        reading.warn("cache.mode replay has neither a cassette nor a cache that lasts: it answers nothing")


def check_upstreams(settings: Settings, reading: Reading) -> None:
    """Add the problems and warnings of the upstreams."""
    if settings.cache.mode == "replay":
        return  # none is called
    outlets: dict[str, tuple[object, object]] = {}
    for path, upstream, url in _addresses(settings):
        if outlets.setdefault(url.origin, (upstream.proxy, upstream.ca_file)) != (upstream.proxy, upstream.ca_file):
            reading.fail_at(path, f"expected one proxy and one ca_file for {url.origin}, found several")
        if reading.sound(f"{path}.base_url", f"{path}.insecure"):
            _check_own_address(settings, path, url, reading)
            _check_plain_http(path, upstream, url, reading)
    _warn_credentials(settings, reading)


def _addresses(settings: Settings) -> Iterator[tuple[str, UpstreamSettings, Url]]:
    for i, upstream in enumerate(settings.upstreams):
        try:
            yield f"upstreams.{i}", upstream, parse_url(upstream.base_url)
        except Invalid:
            continue  # an Azure upstream without base_url, which is reported


def _check_exposure(settings: Settings, reading: Reading) -> None:
    server = settings.server
    if server.socket is not None or is_loopback(server.host) or server.client_keys:
        return
    if not reading.sound("server.host", "server.client_keys", "server.allow_anonymous", "server.socket"):
        return
    if server.allow_anonymous:
        reading.warn(f"server.host {server.host} without client_keys: everybody who reaches it may use it and its keys")
        return
    reading.fail_at(
        "server.host",
        "expected a loopback address, or client_keys (also PROXY_CLIENT_KEYS=name:key), or "
        f"allow_anonymous: true; found {server.host} without them",
    )


def _check_socket(settings: Settings, reading: Reading) -> None:
    path = os.path.expanduser(settings.server.socket or "")
    if len(path.encode()) > LONGEST_SOCKET_PATH:
        message = f"expected a socket's path of at most {LONGEST_SOCKET_PATH} bytes, found {path}"
        reading.fail_at("server.socket", message)


def _check_ops(settings: Settings, reading: Reading) -> None:
    server = settings.server
    if server.ops is None or server.socket is not None or not reading.sound("server.ops", "server.port"):
        return
    host, port = server.ops
    if port and port == server.port and _same_machine(host, server.host):
        reading.fail_at("server.ops", f"expected a port of its own, found server.port ({port})")


def _check_own_address(settings: Settings, path: str, url: Url, reading: Reading) -> None:
    server = settings.server
    if server.socket is not None or url.port != server.port or not reading.sound("server.host", "server.port"):
        return
    if _same_machine(url.host, server.host):
        reading.fail_at(f"{path}.base_url", f"expected an upstream, found the proxy's own address ({url.origin})")


def _same_machine(one: str, other: str) -> bool:
    return one == other or all(is_loopback(host) or host in ("0.0.0.0", "::") for host in (one, other))


def _check_plain_http(path: str, upstream: UpstreamSettings, url: Url, reading: Reading) -> None:
    if url.scheme != "http" or is_loopback(url.host):
        return
    if upstream.pooled and not upstream.insecure:
        message = f"expected https, or insecure: true; found plain http with a key to {url.origin}"
        reading.fail_at(f"{path}.base_url", message)
    else:
        reading.warn(f"upstream {upstream.name} is called over plain http ({url.origin}): others may read along")


def _warn_credentials(settings: Settings, reading: Reading) -> None:
    if settings.passthrough:
        if settings.server.client_keys:
            reading.warn("client_keys, but no upstream has a key: upstreams are called without a credential")
        return
    for _, upstream, url in _addresses(settings):
        if not upstream.pooled and not is_loopback(url.host):
            reading.warn(f"upstream {upstream.name} has no key: {url.origin} is called without a credential")
