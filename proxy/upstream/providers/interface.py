"""Providers: one file each, and one line in the table of `registry`.

A provider turns a route and a model into an upstream URL, and a key into headers. It never sees the client's headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ...cost.pricing import Kind
from ...protocol.routes import Route, Shape


@dataclass(frozen=True, slots=True)
class UpstreamAddress:
    """An upstream as a provider needs it: where it is, and which deployment stands for which model."""

    name: str
    kind: Kind
    base_url: str
    api_version: str | None
    deployments: Mapping[str, str]


class Provider(Protocol):
    """What the module of a provider offers."""

    def url(self, address: UpstreamAddress, route: Route, model: str) -> str:
        """Return the absolute upstream URL, percent-encoded as it is sent."""

    def body_model(self, address: UpstreamAddress, route: Route, model: str, body_model: str | None) -> str | None:
        """Return the `model` that the body must have upstream; None: as the client wrote it."""

    def auth(self, secret: str, organization: str | None, project: str | None) -> tuple[tuple[str, str], ...]:
        """Return the credential headers of a pool key."""

    def client_auth(self, scheme: str, token: str) -> tuple[tuple[str, str], ...]:
        """Return the client's own credential (`bearer` or `api-key`) in this upstream's style."""

    def deployment(self, address: UpstreamAddress, route: Route, model: str) -> str | None:
        """Return the deployment that serves the request; None if the dialect has none."""

    def identity(self, address: UpstreamAddress, model: str, shape: Shape) -> str:
        """Return what of this upstream can change a response: part of the cache key."""
