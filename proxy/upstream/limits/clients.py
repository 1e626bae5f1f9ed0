"""What each client key may use: its models, and limits of its own (contract 7: hits are free for them, too).

A client beyond its limits is refused at once rather than made to wait: a place in the queue is shared by everybody, and
one client's excess must not fill it. A hold is taken for a request before it waits for a key, and ended once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from ...config.limits import Limits
from ...protocol.errors import ProxyError
from ...protocol.request import Client
from ...protocol.routes import CARRIES_NO_MODEL
from .rate_limiter import ExceedsLimit, RateLimiter, Reservation, Wait

_UNKNOWN: Final = 1.0


def check_model(client: Client, *models: str) -> None:
    """Raises ProxyError(model_not_allowed) unless the client may use all of them."""
    if client.models:
        for model in models:
            if not any(fnmatchcase(model, glob) for glob in client.models):
                raise ProxyError("model_not_allowed", f"client {client.name} may not use {model[:60]!r}", param="model")


def check_passthrough(client: Client, method: str, segment: str) -> None:
    """The same for a route whose body is not read: what could run a model nobody looked at is not for this client."""
    if client.models and method not in ("GET", "HEAD", "DELETE") and segment not in CARRIES_NO_MODEL:
        message = f"client {client.name} may use some models only, and which one this route uses is not read"
        raise ProxyError("model_not_allowed", message)


@dataclass(slots=True)
class ClientUsage:
    """What a client has sent upstream since the start. running: requests at work now; tokens: as settled."""

    requests: int = 0
    tokens: int = 0
    running: int = 0


class ClientReservation:
    """One request's share of its client's limits; ended once, later calls do nothing."""

    __slots__ = ("_open", "_tokens", "_use", "reservation")

    def __init__(self, use: ClientUsage, reservation: Reservation | None, tokens: int) -> None:
        self._use = use
        self.reservation = reservation
        self._tokens = tokens
        self._open = True
        use.running += 1

    def settle(self, tokens: int | None) -> None:
        """It went up. tokens: what it used, None where that is unknown: then the estimate."""
        if self._open:
            self._open = False
            self._use.running -= 1
            self._use.requests += 1
            self._use.tokens += self._tokens if tokens is None else max(tokens, 0)
            if self.reservation is not None:
                self.reservation.settle(tokens)

    def cancel(self) -> None:
        """It never went up."""
        if self._open:
            self._open = False
            self._use.running -= 1
            if self.reservation is not None:
                self.reservation.cancel()


Make = Callable[[tuple[str, str], Limits, float], RateLimiter]
"""(name, limits, share to use) -> the windows that hold them."""


class ClientLimits:
    """The client keys' limits. For one event loop: it takes no lock. `limits`: by client name."""

    def __init__(self, limits: Mapping[str, Limits], make: Make | None = None) -> None:
        self._allowances = {
            name: make(("client", name), each, 1.0) if make is not None else RateLimiter(each)
            for name, each in limits.items()
            if each != Limits()
        }
        self._limits = limits
        self._uses = {name: ClientUsage() for name in limits}
        self.counts_tokens = any(each.tpm is not None for each in limits.values())

    def inherit(self, old: ClientLimits) -> None:
        """Takes over what the clients that stay have used: after a reload."""
        for name, use in old._uses.items():
            if name in self._uses:
                self._uses[name] = use
                limits, before = self._limits[name], old._allowances.get(name)
                if before is not None and limits != Limits():
                    before.change(limits, 1.0)
                    self._allowances[name] = before

    def reserve(self, client: Client, tokens: int, now: float) -> ClientReservation | None:
        """A hold for one request of `tokens` (an estimate); None where this client has no key of its own.

        Raises ProxyError(client_limit, request_exceeds_limit).
        """
        use = self._uses.get(client.name)
        if use is None:
            return None
        allowance = self._allowances.get(client.name)
        if allowance is None:
            return ClientReservation(use, None, tokens)
        answer = allowance.reserve(tokens, now)
        if isinstance(answer, Reservation):
            return ClientReservation(use, answer, tokens)
        raise self.refused(client, answer)

    def refused(self, client: Client, answer: Wait | ExceedsLimit) -> ProxyError:
        """What a client beyond its limits is told."""
        if isinstance(answer, ExceedsLimit):
            return ProxyError("request_exceeds_limit", f"{answer.reason} for client {client.name}")
        seconds = answer.seconds if answer.seconds < 1e9 else _UNKNOWN
        message = f"client {client.name} has used up its own limits ; {seconds:.1f} s to go"
        return ProxyError("client_limit", message, retry_after=seconds)

    def headers(self, client: Client, now: float, money: str = "") -> str:
        """The header line that tells used and limit of each of a client's limits; "" for one without limits. money: the
        same of its budget.
        """
        allowance = self._allowances.get(client.name)
        if allowance is None and not money:
            return ""
        levels = allowance.usage(now) if allowance is not None else {}
        parts = [f"{name}={level['used']}/{level['limit']}" for name, level in levels.items()]
        return f"X-Proxy-Client-Limit: {', '.join([*parts, money] if money else parts)}\r\n"

    def report(self, now: float) -> dict[str, dict[str, Any]]:
        """For `GET /_proxy/status`: by client name."""
        return {
            name: {
                "requests": use.requests,
                "tokens": use.tokens,
                "running": use.running,
                "limits": self._allowances[name].usage(now) if name in self._allowances else {},
            }
            for name, use in self._uses.items()
        }

    def reset(self) -> None:
        """Forgets what was used; what runs keeps its place."""
        for allowance in self._allowances.values():
            allowance.reset()
