"""Upstream dialects: one file each, one line in the table.

A dialect turns a route and a model into an upstream URL, and a key into headers. It never sees the client's headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ...cost.pricing import Kind
from ...protocol.routes import Route


@dataclass(frozen=True, slots=True)
class UpstreamAddress:
    """An upstream as a dialect needs it: where it is and how it names things."""

    name: str
    kind: Kind
    base_url: str
    api_version: str | None
    deployments: Mapping[str, str]


class Provider(Protocol):
    """The module interface of a provider file."""

    def url(self, site: UpstreamAddress, route: Route, model: str) -> str:
        """The absolute upstream URL, percent-encoded as it goes on the wire."""

    def body_model(self, site: UpstreamAddress, route: Route, model: str, body_model: str | None) -> str | None:
        """The `model` the body must carry upstream; None: as the client wrote it."""

    def auth(self, secret: str, organization: str | None, project: str | None) -> tuple[tuple[str, str], ...]:
        """The credential headers of a pool key."""

    def client_auth(self, scheme: str, token: str) -> tuple[tuple[str, str], ...]:
        """The client's own credential (`bearer` or `api-key`) in this upstream's style, for pass-through."""

    def identity(self, site: UpstreamAddress, model: str) -> str:
        """What of this upstream can change an answer: part of the cache key."""
