"""What each client key may use: its models, and limits of its own (`docs/keys-and-limits.md`). Cache hits are free.

A client beyond its limits is refused at once and does not wait: all clients share the queue, and one client's excess
must not fill it. A reservation is made before the request waits for a key, and ended once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from ...config.limits import Limits
from ...protocol.errors import ProxyError
from ...protocol.json_edit import is_ambiguous
from ...protocol.request import Client
from .rate_limiter import ExceedsLimit, RateLimiter, Reservation, Wait

UNKNOWN_WAIT: Final = 1.0


def may_use(client: Client, model: str) -> bool:
    """Return whether a client may use a model."""
    return not client.models or any(fnmatchcase(model, glob) for glob in client.models)


def check_model(client: Client, *models: str | tuple[str, ...]) -> None:
    """Raise ProxyError(model_not_allowed) unless the client may use all of these models. A tuple: names of one."""
    if client.models:
        for names in models:
            model, *others = (names,) if isinstance(names, str) else names
            if not any(may_use(client, name) for name in (model, *others)):
                raise ProxyError("model_not_allowed", f"client {client.name} may not use {model[:60]!r}", param="model")


def check_unambiguous(client: Client, body: bytes) -> None:
    """Check a JSON body of a client that may use some models only. Raises ProxyError(model_not_allowed).

    If it has two models, the proxy and the upstream might read different ones.
    """
    if client.models and is_ambiguous(body, "model"):
        message = f"client {client.name} may use some models only, and this body does not name one clearly"
        raise ProxyError("model_not_allowed", message, param="model")


def check_any_model(client: Client) -> None:
    """Check a request that runs a model which the proxy cannot read. Raises ProxyError(model_not_allowed)."""
    if client.models and "*" not in client.models:
        message = f"client {client.name} may use some models only, and which one this request uses cannot be read"
        raise ProxyError("model_not_allowed", message, param="model")


@dataclass(slots=True)
class ClientUsage:
    """What a client has sent upstream since the start. tokens: as settled; in_flight: requests at this moment."""

    requests: int = 0
    tokens: int = 0
    in_flight: int = 0


class ClientReservation:
    """What one request holds of its client's limits. It is ended once; later calls do nothing."""

    __slots__ = ("_open", "_tokens", "_usage", "reservation")

    def __init__(self, usage: ClientUsage, reservation: Reservation | None, tokens: int) -> None:
        self._usage = usage
        self.reservation = reservation
        self._tokens = tokens
        self._open = True
        usage.in_flight += 1

    def settle(self, tokens: int | None) -> None:
        """End it for a request that was sent. tokens: what it used; None if unknown: the estimate counts."""
        if self._open:
            self._open = False
            self._usage.in_flight -= 1
            self._usage.requests += 1
            self._usage.tokens += self._tokens if tokens is None else max(tokens, 0)
            if self.reservation is not None:
                self.reservation.settle(tokens)

    def cancel(self) -> None:
        """End it for a request that was never sent."""
        if self._open:
            self._open = False
            self._usage.in_flight -= 1
            if self.reservation is not None:
                self.reservation.cancel()


MakeRateLimiter = Callable[[tuple[str, str], Limits, float], RateLimiter]
"""Makes the rate limiter of (quota, model), or of ("client", name), from its limits and the share to use."""


class ClientLimits:
    """The client keys' limits. For one event loop: it takes no lock. limits: by client name."""

    def __init__(self, limits: Mapping[str, Limits], make_limiter: MakeRateLimiter | None = None) -> None:
        self._rate_limiters = {
            name: make_limiter(("client", name), each, 1.0) if make_limiter is not None else RateLimiter(each)
            for name, each in limits.items()
            if each != Limits()
        }
        self._limits = limits
        self._usage = {name: ClientUsage() for name in limits}
        self.counts_tokens = any(each.tpm is not None for each in limits.values())

    def inherit(self, old: ClientLimits) -> None:
        """Take over, after a reload, what the clients that stay have used."""
        for name, usage in old._usage.items():
            if name in self._usage:
                self._usage[name] = usage
                limits, rate_limiter = self._limits[name], old._rate_limiters.get(name)
                if rate_limiter is not None and limits != Limits():
                    rate_limiter.change(limits, 1.0)
                    self._rate_limiters[name] = rate_limiter

    def reserve(self, client: Client, tokens: int, now: float) -> ClientReservation | None:
        """Reserve one request of `tokens` (an estimate); None if the client has no key of its own.

        Raises ProxyError(client_limit, request_exceeds_limit).
        """
        usage = self._usage.get(client.name)
        if usage is None:
            return None
        rate_limiter = self._rate_limiters.get(client.name)
        if rate_limiter is None:
            return ClientReservation(usage, None, tokens)
        result = rate_limiter.reserve(tokens, now)
        if isinstance(result, Reservation):
            return ClientReservation(usage, result, tokens)
        raise self.limit_error(client, result)

    def limit_error(self, client: Client, result: Wait | ExceedsLimit) -> ProxyError:
        """Return the error for a client beyond its limits."""
        if isinstance(result, ExceedsLimit):
            return ProxyError("request_exceeds_limit", f"{result.reason} for client {client.name}")
        seconds = result.seconds if result.seconds < 1e9 else UNKNOWN_WAIT
        message = f"client {client.name} has used up its own limits; try again in {seconds:.1f} s"
        return ProxyError("client_limit", message, retry_after=seconds)

    def headers(self, client: Client, now: float, money: str = "") -> tuple[tuple[str, str], ...]:
        """Return the header with used/limit of each of a client's limits; nothing for a client without limits.

        money: the same of its budget.
        """
        rate_limiter = self._rate_limiters.get(client.name)
        if rate_limiter is None and not money:
            return ()
        levels = rate_limiter.usage(now) if rate_limiter is not None else {}
        parts = [f"{name}={level['used']}/{level['limit']}" for name, level in levels.items()]
        return (("X-Proxy-Client-Limit", ", ".join([*parts, money] if money else parts)),)

    def report(self, now: float) -> dict[str, dict[str, Any]]:
        """Return what `GET /_proxy/status` shows, by client name."""
        return {
            name: {
                "requests": usage.requests,
                "tokens": usage.tokens,
                "running": usage.in_flight,
                "limits": self._rate_limiters[name].usage(now) if name in self._rate_limiters else {},
            }
            for name, usage in self._usage.items()
        }

    def reset(self) -> None:
        """Forget what was used. Requests in flight keep their place under `concurrency`."""
        for rate_limiter in self._rate_limiters.values():
            rate_limiter.reset()
