"""The table of providers, and the model that a request is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ...protocol.routes import Route
from . import azure, openai
from .interface import Provider, UpstreamAddress

PROVIDERS: Final[dict[str, Provider]] = {"openai": openai, "azure": azure}


def model_named(addresses: Sequence[UpstreamAddress], route: Route, body_model: str | None) -> str:
    """Return the model a request is for: the body's, else that of the deployment in the path, else ""."""
    if body_model:
        return body_model
    if route.deployment is None:
        return ""
    found = [model for address in addresses for model in azure.models_of(address.deployments, route.deployment)]
    return found[0] if found else route.deployment


def models_that_run(
    addresses: Sequence[UpstreamAddress], route: Route, body_model: str | None
) -> tuple[tuple[str, ...], ...]:
    """Return the models that a request may run, each by all its names.

    On Azure that is the deployment in the path, whatever the body says; elsewhere the model of the body, else the same.
    """
    named = (model_named(addresses, route, body_model),)
    if route.deployment is None:
        return (named,)
    models = [model for address in addresses for model in azure.models_of(address.deployments, route.deployment)]
    on_azure = route.deployment, *models
    kinds = {address.kind for address in addresses}
    return (on_azure,) if kinds == {"azure"} else (on_azure, named) if "azure" in kinds else (named,)
