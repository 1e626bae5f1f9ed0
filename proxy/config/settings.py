"""The settings in force, as frozen values: the shape and the defaults of contract 3.

Durations are seconds, sizes bytes, money is Decimal. `schema.py` says how each is read from text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from ..cost.pricing import Kind
from .limits import Limits
from .secret import Secret
from .tiers import with_tier

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

DEFAULT_API_VERSION = "2024-10-21"
Prices = Mapping[str, Mapping[str, Decimal]]


@dataclass(frozen=True, slots=True)
class ClientKeySettings:
    """Somebody who may call. `digest`: SHA-256 of the key. `namespace`: the cache of those who share it.

    `models`: globs, none for all; `limits`, `usd_per_day`: of what goes upstream for this client.
    """

    name: str
    digest: bytes = field(repr=False)
    namespace: str | None = None
    models: tuple[str, ...] = ()
    limits: Limits = Limits()  # noqa: RUF009 (frozen)
    usd_per_day: Decimal | None = None


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """`socket` stands instead of host and port. `ops`: where the listener for probes and metrics is."""

    host: str = "127.0.0.1"
    port: int = 8484
    workers: int = 1
    max_body: int = 64 * MIB
    max_in_flight: int = 1000
    drain_timeout: float = 30.0
    drain_delay: float = 0.0
    socket: str | None = None
    ops: tuple[str, int] | None = None
    client_keys: tuple[ClientKeySettings, ...] = ()
    allow_anonymous: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    admin_key: Secret | None = None


@dataclass(frozen=True, slots=True)
class KeySettings:
    """A key of the pool. `label` is unique in it; keys naming the same `quota` share their limits."""

    label: str
    secret: Secret
    organization: str | None = None
    project: str | None = None
    weight: float = 1.0
    quota: str = ""
    limits: Mapping[str, Limits] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """Where requests go. `base_url` has no trailing slash; Azure's is the resource's root, less `/openai`.

    `api_version` is Azure's: None means its `/openai/v1` surface. `deployments`: model glob -> deployment.
    `entra_id`: called with tokens of the proxy's own identity instead of keys. `proxy`: a secret, as it may hold a
    password. `ca_file`: certificates trusted in place of the system's.
    """

    name: str = "openai"
    kind: Kind = "openai"
    base_url: str = "https://api.openai.com/v1"
    models: tuple[str, ...] = ("*",)
    priority: int = 0
    cache_as: str | None = None
    keys: tuple[KeySettings, ...] = ()
    api_version: str | None = None
    deployments: Mapping[str, str] = field(default_factory=dict)
    insecure: bool = False
    prices: Prices = field(default_factory=dict)
    entra_id: bool = False
    proxy: Secret | None = None
    ca_file: str | None = None

    @property
    def pooled(self) -> bool:
        """Whether it is called with a credential of ours."""
        return bool(self.keys) or self.entra_id


@dataclass(frozen=True, slots=True)
class TtlSettings:
    chat: float = 86400.0
    completions: float = 86400.0
    responses: float = 86400.0
    embeddings: float = 604800.0
    moderations: float = 86400.0


@dataclass(frozen=True, slots=True)
class CacheSettings:
    backend: str = "memory"
    path: str = "~/.cache/openai-proxy/cache.db"
    memory_size: int = 256 * MIB
    max_size: int = 4 * GIB
    max_entry: int = 8 * MIB
    ttl: TtlSettings = field(default_factory=TtlSettings)
    when: str = "always"
    mode: str = "normal"
    cassette: str | None = None
    store_requests: bool = False
    ignore_fields: tuple[str, ...] = (
        "user",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    )
    shared: bool = False
    embeddings_per_item: bool = True
    stale_while_revalidate: float = 0.0
    stale_if_error: float = 0.0
    coalesce: bool = True
    on_disconnect: str = "cancel"


@dataclass(frozen=True, slots=True)
class ThrottleSettings:
    """`limits`: model glob -> limits of each quota. `max_wait` None: the client's own deadline (`auto`)."""

    backend: str = "memory"
    limits: Mapping[str, Limits] = field(default_factory=dict)
    tier: str | None = None
    use: float = 1.0
    adaptive: bool = True
    max_wait: float | None = 60.0
    max_queue: int = 1000


@dataclass(frozen=True, slots=True)
class RetrySettings:
    max_retries: int = 3
    base_delay: float = 1.0
    max_delay: float = 10.0
    jitter: float = 1.0
    budget: float = 0.2
    ambiguous: bool = True
    fallbacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    failures: int = 5
    window: float = 30.0
    open_for: float = 15.0


@dataclass(frozen=True, slots=True)
class TimeoutSettings:
    connect: float = 5.0
    first_byte: float = 600.0
    idle: float = 300.0
    total: float = 600.0


@dataclass(frozen=True, slots=True)
class BudgetSettings:
    usd_per_day: Decimal | None = None
    usd_per_month: Decimal | None = None
    on_exceeded: str = "refuse"
    warn_at: float = 0.8


@dataclass(frozen=True, slots=True)
class CostSettings:
    prices: Prices = field(default_factory=dict)
    stream_usage: str = "inject"
    stream_comment: bool = False
    budget: BudgetSettings = field(default_factory=BudgetSettings)


@dataclass(frozen=True, slots=True)
class LedgerSettings:
    path: str = "~/.local/share/openai-proxy/usage.db"
    enabled: bool = True


@dataclass(frozen=True, slots=True)
class RedisSettings:
    """`url` is a secret: it may hold a password."""

    url: Secret | None = None
    prefix: str = "openai-proxy"


@dataclass(frozen=True, slots=True)
class LogSettings:
    level: str = "info"
    format: str = "text"


@dataclass(frozen=True, slots=True)
class Settings:
    server: ServerSettings = field(default_factory=ServerSettings)
    upstreams: tuple[UpstreamSettings, ...] = (UpstreamSettings(),)
    selection: str = "auto"
    cache: CacheSettings = field(default_factory=CacheSettings)
    throttle: ThrottleSettings = field(default_factory=ThrottleSettings)
    retry: RetrySettings = field(default_factory=RetrySettings)
    breaker: BreakerSettings = field(default_factory=BreakerSettings)
    timeouts: TimeoutSettings = field(default_factory=TimeoutSettings)
    cost: CostSettings = field(default_factory=CostSettings)
    ledger: LedgerSettings = field(default_factory=LedgerSettings)
    redis: RedisSettings = field(default_factory=RedisSettings)
    log: LogSettings = field(default_factory=LogSettings)

    @property
    def passthrough(self) -> bool:
        """No upstream has a key: each client's own credential goes up."""
        return not any(upstream.pooled for upstream in self.upstreams)

    def limits_of(self, upstream: UpstreamSettings, key: KeySettings | None = None) -> Mapping[str, Limits]:
        """The limits of one key by model glob: what is configured, over `throttle.tier` where OpenAI set that."""
        tier = self.throttle.tier if upstream.kind == "openai" else None
        return with_tier(tier, {**self.throttle.limits, **(key.limits if key is not None else {})})
