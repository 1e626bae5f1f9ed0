"""The values of choosing a key: the keys, what a request asks of one, what it gets, and why it gets none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final, Literal

import msgspec

from ...config.limits import Limits
from ..limits.rate_limiter import Reservation, Wait
from ..providers.azure import deployment_in, models_of


@dataclass(frozen=True, slots=True)
class UpstreamKey:
    """A key as the pool sees it, without its secret.

    upstream: index of its upstream. models: globs that it serves. maker: stands for it in what is remembered of the
    objects it makes, see `owner_table.maker_of`. deployments: those of models on an Azure upstream, None elsewhere.
    """

    label: str
    upstream: int
    models: tuple[str, ...]
    priority: int = 0
    quota: str = ""
    limits: Mapping[str, Limits] = field(default_factory=dict)
    weight: float = 1.0
    maker: str = ""
    deployments: Mapping[str, str] | None = None

    def name_of(self, model: str, deployment: str = "") -> str:
        """Return the name under which a request counts with this key: Azure's deployment, elsewhere the model.

        deployment: that in the path, "" for none.
        """
        if self.deployments is None:
            return model
        return deployment or deployment_in(self.deployments, model)

    def names_of(self, model: str, deployment: str = "") -> tuple[str, ...]:
        """Return all names of what runs with this key, the deciding one first."""
        if self.deployments is None:
            return (model,)
        if deployment:
            return deployment, *models_of(self.deployments, deployment)
        mapped = deployment_in(self.deployments, model)
        return (mapped, model) if mapped != model else (model,)

    def serves(self, model: str, deployment: str = "") -> bool:
        """Return whether the upstream serves a model; "": any, because the request does not say which runs."""
        if "*" in self.models or not (model or deployment):
            return True
        return any(fnmatchcase(name, glob) for name in self.names_of(model, deployment) for glob in self.models)


def by_priority(keys: Sequence[UpstreamKey]) -> tuple[tuple[UpstreamKey, ...], ...]:
    """Return the keys in groups of rising priority number."""
    numbers = sorted({key.priority for key in keys})
    return tuple(tuple(key for key in keys if key.priority == number) for number in numbers)


class Lease(msgspec.Struct, frozen=True):
    """A key with its share of the limits reserved.

    reservation: None if no limit applies. tokens: the estimate. name: under which the request counts, see `name_of`.
    """

    key: UpstreamKey
    reservation: Reservation | None
    tokens: int = 0
    name: str = ""


class KeyRequest(msgspec.Struct, frozen=True):
    """What a request asks of the key it gets.

    prefix: digest of the beginning of its prompt, b"" for none. pinned_to: label of the only key that will do, '' for
    any. min_priority: only priorities of a higher number than this. avoid: upstreams that failed it, to be tried last.
    groups: the keys to choose from if the model is not known, in groups of rising priority number; no limit applies
    then. None: the keys that serve the model. deployment: Azure's in the path.
    route: method and first path segment, for keys that lack a right.
    """

    prefix: bytes = b""
    pinned_to: str = ""
    min_priority: int | None = None
    avoid: frozenset[int] = frozenset()
    groups: tuple[tuple[UpstreamKey, ...], ...] | None = None
    route: str = ""
    deployment: str = ""


ANY_KEY: Final = KeyRequest()


@dataclass(frozen=True, slots=True)
class NotReady:
    """No key is ready now. The queue waits `wait.seconds`; `why` is the error's code if `max_wait` ends before."""

    wait: Wait
    why: Literal["throttled", "keys_cooling"]


@dataclass(frozen=True, slots=True)
class NoKey:
    """No key will do, however long the request waits.

    retry_after: seconds until another request may find one, None if unknown.
    """

    why: Literal["no_usable_key", "request_exceeds_limit", "circuit_open"]
    detail: str
    retry_after: float | None = None


class Candidates(msgspec.Struct):
    """One search for a key: what is asked, and what stands in the way of each key.

    tokens: estimated. now: monotonic seconds. quota: overrides the keys' own (pass-through: one a credential).
    cooling, throttled, breaker_open: seconds to wait, a key each.
    """

    model: str
    tokens: int
    now: float
    quota: str | None = None
    request: KeyRequest = ANY_KEY
    cooling: list[float] = msgspec.field(default_factory=list)
    throttled: list[float] = msgspec.field(default_factory=list)
    breaker_open: list[float] = msgspec.field(default_factory=list)
    unusable: list[str] = msgspec.field(default_factory=list)
    missing: list[UpstreamKey] = msgspec.field(default_factory=list)
    rejected: list[UpstreamKey] = msgspec.field(default_factory=list)
    too_large: str | None = None

    def quota_of(self, key: UpstreamKey) -> tuple[str, str]:
        """Return the (quota, model) under which a request on this key counts."""
        return self.quota or key.quota or key.label, self.name_of(key)

    def name_of(self, key: UpstreamKey) -> str:
        """Return the name under which the request counts with this key."""
        return key.name_of(self.model, self.request.deployment)

    def result(self) -> NotReady | NoKey:
        """Return why there is no lease."""
        if self.throttled or self.cooling:
            if self.cooling and (not self.throttled or min(self.cooling) < min(self.throttled)):
                return NotReady(Wait(min(self.cooling)), "keys_cooling")
            return NotReady(Wait(min(self.throttled)), "throttled")
        if self.too_large is not None:
            return NoKey("request_exceeds_limit", self.too_large)
        if self.breaker_open:
            detail = "every upstream that serves this has failed too often of late and is left alone for a while"
            return NoKey("circuit_open", detail, min(self.breaker_open))
        return NoKey("no_usable_key", "no usable key: " + (", ".join(self.unusable) or "every key was refused"))
