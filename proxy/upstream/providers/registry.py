"""The table of providers, and the model that a request is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ...protocol.routes import Route
from . import azure, openai
from .interface import Provider, UpstreamAddress


def models_in_path(addresses: Sequence[UpstreamAddress], route: Route) -> tuple[str, ...]:
    """Return the model of the deployment in the path, which Azure serves whatever the body says; none without Azure."""
    if route.deployment is None or all(address.kind != "azure" for address in addresses):
        return ()
    return (model_named(addresses, route, None),)


_GLOB: Final = frozenset("*?[")


PROVIDERS: Final[dict[str, Provider]] = {"openai": openai, "azure": azure}


def model_named(addresses: Sequence[UpstreamAddress], route: Route, body_model: str | None) -> str:
    """Return the model a request is for: the body's, else that of the deployment in the path, else ""."""
    if body_model:
        return body_model
    if route.deployment is None:
        return ""
    for address in addresses:
        for model, deployment in address.deployments.items():
            if deployment == route.deployment and not _GLOB & set(model):
                return model
    return route.deployment
