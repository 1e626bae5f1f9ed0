"""The table of providers, and which model a request names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ...protocol.routes import Route
from . import azure, openai
from .interface import Provider, UpstreamAddress


def models_in_path(sites: Sequence[UpstreamAddress], route: Route) -> tuple[str, ...]:
    """The model that an Azure upstream would serve whatever the body says: that of the deployment in the path."""
    if route.deployment is None or all(site.kind != "azure" for site in sites):
        return ()
    return (model_named(sites, route, None),)


_GLOB: Final = frozenset("*?[")


PROVIDERS: Final[dict[str, Provider]] = {"openai": openai, "azure": azure}


def model_named(sites: Sequence[UpstreamAddress], route: Route, body_model: str | None) -> str:
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
