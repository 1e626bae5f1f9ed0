"""Azure OpenAI: deployments in the path, `api-version` in the query, `api-key` as credential.

The paths are those of Microsoft's *Azure OpenAI REST API reference*. Without an `api_version` the newer `/openai/v1`
surface is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from ...protocol.errors import ProxyError
from ...protocol.routes import REALTIME, Route, Shape, replaced_query

if TYPE_CHECKING:
    from .interface import UpstreamAddress

_GLOB: Final = frozenset("*?[")
_BY_DEPLOYMENT: Final = frozenset({"chat", "completions", "embeddings", "audio", "images"})
"""First segments of the operations that Azure keeps below `/openai/deployments/{deployment}`."""


def deployment_in(deployments: Mapping[str, str], model: str) -> str:
    """Return the deployment that stands for `model`: by exact name, else by the longest glob, else the model's name."""
    exact = deployments.get(model)
    if exact is not None:
        return exact
    globs = [glob for glob in deployments if fnmatchcase(model, glob)]
    return deployments[max(globs, key=len)] if globs else model


def models_of(deployments: Mapping[str, str], deployment: str) -> list[str]:
    """Return the models that a deployment stands for, as far as they are named without a glob."""
    return [model for model, name in deployments.items() if name == deployment and not _GLOB & set(model)]


def deployment_of(address: UpstreamAddress, model: str) -> str:
    """Return the deployment of this upstream that stands for `model`."""
    return deployment_in(address.deployments, model)


def _segment(deployment: str) -> str:
    """Return a deployment as one path segment. Raises ProxyError(bad_request) for a name that would lead elsewhere.

    Quoting does not help against dots (RFC 3986 section 5.2.4).
    """
    if deployment in (".", ".."):
        raise ProxyError("bad_request", "this model cannot be the name of a deployment", param="model")
    return quote(deployment, safe="", errors="replace")


def url(address: UpstreamAddress, route: Route, model: str) -> str:
    root = address.base_url + "/openai"
    query = route.query
    if route.path == REALTIME and route.shape == "openai" and model:  # OpenAI's query names a model
        name = "model" if address.api_version is None else "deployment"
        query = replaced_query(query, {"deployment", "model"}, (name, deployment_of(address, model)))
    if _is_v1(address, route.shape):
        return f"{root}/v1{route.path}" + (f"?{query}" if query else "")
    if not any(part.startswith("api-version=") for part in query.split("&")):
        version = f"api-version={quote(address.api_version or 'preview', safe='')}"
        query = f"{query}&{version}" if query else version
    if route.deployment is not None:
        return f"{root}/deployments/{_segment(route.deployment)}{route.path}?{query}"
    if route.segment in _BY_DEPLOYMENT and model and route.shape == "openai":
        return f"{root}/deployments/{_segment(deployment_of(address, model))}{route.path}?{query}"
    return f"{root}{route.path}?{query}"


def body_model(address: UpstreamAddress, route: Route, model: str, body_model: str | None) -> str | None:
    if route.deployment is not None or body_model is None:
        return None
    if route.shape == "openai" and address.api_version is not None and route.segment in _BY_DEPLOYMENT:
        return None  # the path names the deployment; Azure does not read the body's model
    deployment = deployment_of(address, body_model)
    return deployment if deployment != body_model else None


def auth(secret: str, organization: str | None, project: str | None) -> tuple[tuple[str, str], ...]:
    return (("api-key", secret),)


def client_auth(scheme: str, token: str) -> tuple[tuple[str, str], ...]:
    if scheme == "bearer" and token.startswith("eyJ"):  # an Entra ID token is a JWT: it goes as bearer only
        return (("Authorization", f"Bearer {token}"),)
    return (("api-key", token),)


def deployment(address: UpstreamAddress, route: Route, model: str) -> str | None:
    return route.deployment or deployment_of(address, model)


def _is_v1(address: UpstreamAddress, shape: Shape) -> bool:
    """Whether a request in this shape goes to the `/openai/v1` surface."""
    return shape == "azure-v1" or (address.api_version is None and shape == "openai")


def identity(address: UpstreamAddress, model: str, shape: Shape) -> str:
    surface = "v1" if _is_v1(address, shape) else address.api_version or "preview"
    return f"azure {address.base_url} {surface} {deployment_of(address, model)}"
