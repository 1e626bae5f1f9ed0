"""Every setting: its kind, its default and one sentence, as the fields of frozen dataclasses.

Durations are seconds, sizes are bytes, money is `Decimal`. Reading, `openai-proxy check`, the manual
(`docs/settings.md`), the JSON Schema and `config.yaml` follow from this description.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final

from ..cost.pricing import RATE_NAMES, Kind
from .description import (
    Leaf,
    ListOf,
    MapOf,
    OneOf,
    Section,
    fixed_setting,
    optional,
    section,
    section_of,
    setting,
)
from .key_tables import ADMIN_KEY, CLIENT_KEYS, KEYS, LIMITS_BY_GLOB
from .limits import Limits
from .problems import Invalid
from .secret import Secret
from .tiers import with_tier
from .urls import parse_url, proxy_url
from .values import (
    ALLOWED_HOST,
    API_VERSION,
    BOOLEAN,
    DEPLOYMENT,
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
    VISIBLE,
    choice,
    duration,
    duration_or_auto,
    integer,
    number,
    size,
)

MIB: Final = 1024 * 1024
GIB: Final = 1024 * MIB
HOUR: Final = 3600.0
DEFAULT_API_VERSION: Final = "2024-10-21"
Prices = Mapping[str, Mapping[str, Decimal]]

_SPAN: Final = duration()
_POSITIVE_SPAN: Final = duration(0.001)
_RATE: Final = choice(*RATE_NAMES)
_PRICES: Final = MapOf(GLOB, MapOf(_RATE, MONEY, needed="input"))
UPSTREAM_PRICES: Final = OneOf((choice("openai", "none"), _PRICES))
_BASE_URL: Final = Leaf("a base URL", parse_url, secret=True)
_PROXY: Final = Leaf("a proxy such as http://proxy.example:3128", lambda text: Secret(proxy_url(text)), secret=True)
_ESSENTIAL: Final = frozenset({"model", "messages", "input", "prompt", "instructions", "tools"})


def _no_essential(names: tuple[str, ...]) -> None:
    for name in names:
        if name in _ESSENTIAL:
            raise Invalid(f"expected fields that do not change the answer, found {name}")


@dataclass(frozen=True, slots=True)
class ClientKeySettings:
    """A client that may call. `digest`: SHA-256 of its key. `namespace`: the cache it shares with those of that name.

    `models`: globs, none for all. `limits`, `usd_per_day`: of what goes upstream for this client.
    """

    name: str
    digest: bytes = field(repr=False)
    namespace: str | None = None
    models: tuple[str, ...] = ()
    limits: Limits = Limits()  # noqa: RUF009 (frozen)
    usd_per_day: Decimal | None = None


@dataclass(frozen=True, slots=True)
class ServerSettings:
    host: str = fixed_setting(HOST, "127.0.0.1", "Address to listen on; one beyond loopback needs client keys.")
    port: int = fixed_setting(integer(0, 65535), 8484, "Port; 0: any free one, printed at the start.")
    workers: int = fixed_setting(integer(1, 256), 1, "Processes that share the port.")
    max_body: int = setting(size(1), 64 * MIB, "Largest request of the five cached endpoints; a larger one is 413.")
    max_upload: int = setting(size(1), GIB, "Largest request of the routes that are passed through.")
    keepalive: float = setting(
        _SPAN, 0.0, "A stream that has had no byte for so long gets a comment, also before its first event; 0s: none."
    )
    max_in_flight: int = setting(integer(1), 1000, "Requests at the same time; more are refused with 503 overloaded.")
    drain_timeout: float = setting(_SPAN, 30.0, "After SIGTERM, running requests may take this long to finish.")
    drain_delay: float = setting(_SPAN, 0.0, "How long SIGTERM still accepts connections while /readyz says 503.")
    socket: str | None = fixed_setting(optional(SOCKET_PATH), None, "Unix socket instead of host and port, mode 0600.")
    ops: tuple[str, int] | None = fixed_setting(
        optional(HOST_AND_PORT), None, "Second listener, for /healthz, /readyz and /metrics only: any Host, no key."
    )
    client_keys: tuple[ClientKeySettings, ...] = setting(
        CLIENT_KEYS, (), "Clients that may call; none: every client on this machine, and no other."
    )
    allow_anonymous: bool = setting(BOOLEAN, False, "Serve an address beyond loopback without client keys.")
    allowed_hosts: tuple[str, ...] = setting(ListOf(ALLOWED_HOST), (), "Host names served besides those of loopback.")
    allowed_origins: tuple[str, ...] = setting(
        ListOf(ORIGIN), (), 'Browser origins that may call; globs within a scheme (`vscode-webview://*`), and "null".'
    )
    admin_key: Secret | None = setting(ADMIN_KEY, None, "Key for /metrics and /_proxy; none: loopback only.")


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
    """An upstream. `base_url` has no trailing slash; Azure's is the resource's root, without `/openai`.

    `api_version` is Azure's: None means its `/openai/v1` surface. `proxy` is a secret, as it may hold a password.
    """

    name: str = setting(optional(NAME), "openai", "Name in headers and logs; default: its kind, numbered from 2.")
    kind: Kind = setting(optional(choice("openai", "azure")), "openai", "API it speaks; default: what the URL shows.")
    base_url: str = setting(optional(_BASE_URL), "https://api.openai.com/v1", "Base URL.")
    models: tuple[str, ...] = setting(ListOf(GLOB, at_least=1), ("*",), "Models that it serves.")
    priority: int = setting(
        integer(0, 1000), 0, "Equal numbers form one pool; a higher one serves if no lower one can."
    )
    cache_as: str | None = setting(optional(VISIBLE), None, "Name that replaces URL and deployment in the cache key.")
    keys: tuple[KeySettings, ...] = setting(KEYS, (), "Keys: a text each, or a table.")
    api_version: str | None = setting(
        optional(API_VERSION), None, f"Azure: default {DEFAULT_API_VERSION}; v1: /openai/v1."
    )
    deployments: Mapping[str, str] = setting(
        MapOf(GLOB, DEPLOYMENT), {}, "Azure: deployments by model; default: its name."
    )
    insecure: bool = setting(BOOLEAN, False, "Allow plain http with a key to another machine.")
    prices: Prices | str = setting(
        UPSTREAM_PRICES, {}, "As cost.prices, for this upstream; or openai or none: the built-in list that applies."
    )
    entra_id: bool = setting(BOOLEAN, False, "Azure: use tokens of this machine's identity instead of keys.")
    proxy: Secret | None = setting(optional(_PROXY), None, "HTTP proxy to reach it through.")
    ca_file: str | None = setting(optional(PATH), None, "Certificates (PEM) to trust instead of the system's.")

    @property
    def pooled(self) -> bool:
        """Whether it is called with a credential of the proxy's."""
        return bool(self.keys) or self.entra_id


UPSTREAM: Final = Section(section_of(UpstreamSettings).settings)
UPSTREAMS: Final = ListOf(UPSTREAM)


@dataclass(frozen=True, slots=True)
class TtlSettings:
    chat: float = setting(_SPAN, 24 * HOUR, "Time that chat completions are fresh.")
    completions: float = setting(_SPAN, 24 * HOUR, "Time that completions are fresh.")
    responses: float = setting(_SPAN, 24 * HOUR, "Time that responses are fresh.")
    embeddings: float = setting(_SPAN, 168 * HOUR, "Time that embeddings are fresh.")
    moderations: float = setting(_SPAN, 24 * HOUR, "Time that moderations are fresh.")


_IGNORED: Final = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")


@dataclass(frozen=True, slots=True)
class CacheSettings:
    backend: str = fixed_setting(
        choice("memory", "sqlite", "redis", "off"),
        "memory",
        "Where responses are stored; memory stands in front of sqlite and redis.",
    )
    path: str = fixed_setting(PATH, "~/.cache/openai-proxy/cache.db", "File of the sqlite backend.")
    memory_size: int = fixed_setting(size(), 256 * MIB, "Memory for responses; the least recently used go first.")
    max_size: int = fixed_setting(size(1), 4 * GIB, "Size of the sqlite file; the least recently used go first.")
    max_entry: int = fixed_setting(size(1), 8 * MIB, "Largest response that is stored.")
    ttl: TtlSettings = section(TtlSettings, "How long responses are fresh.")
    when: str = setting(
        choice("always", "deterministic", "never"),
        "always",
        "For which requests; deterministic: temperature 0, a seed, embeddings, moderations.",
    )
    mode: str = fixed_setting(
        choice("normal", "replay", "refresh"),
        "normal",
        "Replay: nothing goes upstream, a miss is 504; refresh: always ask, and overwrite.",
    )
    cassette: str | None = fixed_setting(
        optional(PATH), None, "File of responses: replay reads it; otherwise used responses are merged into it."
    )
    store_requests: bool = setting(BOOLEAN, False, "Store the request with the response, without its headers.")
    ignore_fields: tuple[str, ...] = setting(
        ListOf(FIELD, check=_no_essential), _IGNORED, "Fields left out of the cache key."
    )
    shared: bool = setting(BOOLEAN, False, "Clients with different client keys share responses.")
    embeddings_per_item: bool = setting(BOOLEAN, True, "Send only those texts of a batch that are not cached.")
    stale_while_revalidate: float = fixed_setting(
        _SPAN, 0.0, "Time past its ttl that a response serves during its renewal."
    )
    stale_if_error: float = fixed_setting(_SPAN, 0.0, "Time past its ttl that a response serves if all upstreams fail.")
    coalesce: bool = setting(BOOLEAN, True, "Identical requests at the same time make one upstream call.")
    on_disconnect: str = setting(
        choice("cancel", "finish"), "cancel", "Finish: read to the end (within 60 s) and store."
    )


@dataclass(frozen=True, slots=True)
class ThrottleSettings:
    """`limits`: model glob -> limits of each quota. `max_wait` None: the client's own deadline (`auto`)."""

    backend: str = fixed_setting(
        choice("memory", "redis"), "memory", "Redis: limits hold across all proxies that use it."
    )
    limits: Mapping[str, Limits] = setting(LIMITS_BY_GLOB, {}, "Limits of each quota by model or glob.")
    tier: str | None = setting(
        optional(choice("1", "2", "3", "4", "5", "free")), None, "OpenAI's published limits, below `limits`."
    )
    use: float = setting(SHARE, 1.0, "Share of each limit to use.")
    adaptive: bool = setting(BOOLEAN, True, "Obey the limits in the upstream's x-ratelimit-* headers too.")
    max_wait: float | None = setting(
        duration_or_auto(), 60.0, "Longest wait in the queue; auto: the client's deadline less 5 s."
    )
    max_queue: int = setting(integer(), 1000, "Requests that may wait; more are refused with 429 queue_full.")


@dataclass(frozen=True, slots=True)
class RetrySettings:
    max_retries: int = setting(integer(0, 10), 3, "Retries of one request.")
    base_delay: float = setting(_SPAN, 1.0, "Delay: min(base_delay * 2^attempt + random(0, jitter), max_delay).")
    max_delay: float = setting(_SPAN, 10.0, "Longest delay.")
    jitter: float = setting(_SPAN, 1.0, "Largest random part of a delay.")
    budget: float = setting(number(1.0), 0.2, "Retries as a share of an upstream's requests in 10 s; 10 are free.")
    ambiguous: bool = setting(BOOLEAN, True, "Retry if the connection died after sending and before any response.")
    fallbacks: Mapping[str, tuple[str, ...]] = setting(
        MapOf(GLOB, ListOf(GLOB, at_least=1)), {}, "Models to try, by model, when every key and upstream failed."
    )


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    failures: int = setting(integer(1), 5, "Failures of one kind in a row that open the breaker.")
    window: float = setting(_POSITIVE_SPAN, 30.0, "Time within which these failures happen.")
    open_for: float = setting(_POSITIVE_SPAN, 15.0, "Time after which one request may try the upstream.")


@dataclass(frozen=True, slots=True)
class TimeoutSettings:
    connect: float = setting(_POSITIVE_SPAN, 5.0, "Time to connect.")
    first_byte: float = setting(_POSITIVE_SPAN, 600.0, "Time until the response begins.")
    idle: float = setting(_POSITIVE_SPAN, 300.0, "Longest pause within a response.")
    total: float = setting(_POSITIVE_SPAN, 600.0, "Time for a plain response, and for a stream up to its first event.")


@dataclass(frozen=True, slots=True)
class BudgetSettings:
    usd_per_day: Decimal | None = setting(optional(MONEY), None, "USD a day (UTC).")
    usd_per_month: Decimal | None = setting(optional(MONEY), None, "USD a month (UTC).")
    on_exceeded: str = setting(choice("refuse", "cache_only"), "refuse", "What happens to requests when it is spent.")
    warn_at: float = setting(SHARE, 0.8, "Share at which the log warns.")


@dataclass(frozen=True, slots=True)
class CostSettings:
    prices: Prices = setting(_PRICES, {}, "USD per 1M tokens by model or glob, over the built-in list.")
    stream_usage: str = setting(
        choice("inject", "off"), "inject", "Inject: ask for the usage of streams if no client does."
    )
    stream_comment: bool = setting(BOOLEAN, False, "End streams with a comment that holds the cost.")
    budget: BudgetSettings = section(BudgetSettings, "What the proxy may spend.")


@dataclass(frozen=True, slots=True)
class LedgerSettings:
    path: str = fixed_setting(PATH, "~/.local/share/openai-proxy/usage.db", "File of the ledger.")
    enabled: bool = fixed_setting(BOOLEAN, True, "Keep the ledger.")


@dataclass(frozen=True, slots=True)
class RedisSettings:
    """`url` is a secret: it may hold a password."""

    url: Secret | None = fixed_setting(
        optional(SECRET), None, "redis://, rediss:// or unix://; default: REDIS_URL, or REDIS_HOST, _PORT, _PASSWORD."
    )
    prefix: str = fixed_setting(NAME, "openai-proxy", "Beginning of every key in Redis, at most 64 bytes.")


@dataclass(frozen=True, slots=True)
class LogSettings:
    level: str = setting(choice("debug", "info", "warning", "error"), "info", "Least important lines that are written.")
    format: str = setting(choice("text", "json"), "text", "Form of log lines.")


@dataclass(frozen=True, slots=True)
class Settings:
    server: ServerSettings = section(ServerSettings, "How the proxy listens, and who may call.")
    upstreams: tuple[UpstreamSettings, ...] = setting(
        UPSTREAMS, (UpstreamSettings(),), "Where requests go; none: what the OPENAI_* and AZURE_* variables say."
    )
    selection: str = setting(
        choice("auto", "headroom", "round_robin", "sticky", "weighted"), "auto", "How a key of the pool is chosen."
    )
    cache: CacheSettings = section(CacheSettings, "Which responses are stored, where and for how long.")
    throttle: ThrottleSettings = section(ThrottleSettings, "Rate limits, and how requests wait for them.")
    retry: RetrySettings = section(RetrySettings, "How failed requests are tried again.")
    breaker: BreakerSettings = section(BreakerSettings, "When an upstream that fails is left alone.")
    timeouts: TimeoutSettings = section(TimeoutSettings, "How long the proxy waits for an upstream.")
    cost: CostSettings = section(CostSettings, "What requests cost, and what may be spent.")
    ledger: LedgerSettings = section(LedgerSettings, "Counts and costs of requests, never prompts or responses.")
    redis: RedisSettings = section(RedisSettings, "For cache.backend and throttle.backend redis.")
    log: LogSettings = section(LogSettings, "What is logged, and how.")

    @property
    def passthrough(self) -> bool:
        """No upstream has a key: each client's own credential goes up."""
        return not any(upstream.pooled for upstream in self.upstreams)

    def limits_of(self, upstream: UpstreamSettings, key: KeySettings | None = None) -> Mapping[str, Limits]:
        """The limits of one key by model glob: what is configured, over `throttle.tier` where OpenAI set that."""
        tier = self.throttle.tier if upstream.kind == "openai" else None
        return with_tier(tier, {**self.throttle.limits, **(key.limits if key is not None else {})})
