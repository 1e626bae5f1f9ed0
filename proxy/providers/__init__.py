"""Upstream dialects: one file each, one line in the table.

A dialect turns a route and a model into an upstream URL, and a key into headers. It never sees the client's headers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from ..core.pricing import Kind
from ..core.routes import Route
from . import azure, openai


@dataclass(frozen=True, slots=True)
class Site:
    """An upstream as a dialect needs it: where it is and how it names things."""

    name: str
    kind: Kind
    base_url: str
    api_version: str | None
    deployments: Mapping[str, str]


class Dialect(Protocol):
    """The module interface of a provider file."""

    def url(self, site: Site, route: Route, model: str) -> str:
        """The absolute upstream URL, percent-encoded as it goes on the wire."""

    def body_model(self, site: Site, route: Route, model: str, body_model: str | None) -> str | None:
        """The `model` the body must carry upstream; None: as the client wrote it."""

    def auth(self, secret: str, organization: str | None, project: str | None) -> tuple[tuple[str, str], ...]:
        """The credential headers of a pool key."""

    def client_auth(self, scheme: str, token: str) -> tuple[tuple[str, str], ...]:
        """The client's own credential (`bearer` or `api-key`) in this upstream's style, for pass-through."""

    def identity(self, site: Site, model: str) -> str:
        """What of this upstream can change an answer: part of the cache key."""


def models_in_path(sites: Sequence[Site], route: Route) -> tuple[str, ...]:
    """The model that an Azure upstream would serve whatever the body says: that of the deployment in the path."""
    if route.deployment is None or all(site.kind != "azure" for site in sites):
        return ()
    return (model_named(sites, route, None),)


_GLOB: Final = frozenset("*?[")

DIALECTS: Final[dict[str, Dialect]] = {"openai": openai, "azure": azure}


def model_named(sites: Sequence[Site], route: Route, body_model: str | None) -> str:
    """The model a request is for: the body's, else what the deployment in the path stands for, else ''."""
    if body_model:
        return body_model
    if route.deployment is None:
        return ""
    for site in sites:
        for model, deployment in site.deployments.items():
            if deployment == route.deployment and not _GLOB & set(model):
                return model
    return route.deployment
