"""Azure OpenAI: deployments in the path, `api-version` in the query, `api-key` as credential.

Paths after Microsoft's *Azure OpenAI REST API reference*; without an `api_version` the newer `/openai/v1` surface is
used.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from ...protocol.errors import ProxyError
from ...protocol.routes import Route

if TYPE_CHECKING:
    from .interface import UpstreamAddress

_BY_DEPLOYMENT: Final = frozenset({"chat", "completions", "embeddings", "audio", "images"})
"""First segments of the operations that Azure keeps below `/openai/deployments/{deployment}`."""


def deployment_of(site: UpstreamAddress, model: str) -> str:
    """The deployment that stands for `model`: the map's exact name, else its longest matching glob, else the model's
    own name.
    """
    exact = site.deployments.get(model)
    if exact is not None:
        return exact
    globs = [glob for glob in site.deployments if fnmatchcase(model, glob)]
    return site.deployments[max(globs, key=len)] if globs else model


def _segment(deployment: str) -> str:
    """A deployment as one path segment. Raises Refusal(bad_request) for a name that would lead elsewhere: quoting does
    not help against dots (RFC 3986 section 5.2.4)."""
    if deployment in (".", ".."):
        raise ProxyError("bad_request", "this model cannot be the name of a deployment", param="model")
    return quote(deployment, safe="", errors="replace")


def url(site: UpstreamAddress, route: Route, model: str) -> str:
    root = site.base_url + "/openai"
    query = route.query
    if route.shape == "azure-v1" or (site.api_version is None and route.shape == "openai"):
        return f"{root}/v1{route.path}" + (f"?{query}" if query else "")
    if not any(part.startswith("api-version=") for part in query.split("&")):
        version = f"api-version={quote(site.api_version or 'preview', safe='')}"
        query = f"{query}&{version}" if query else version
    if route.deployment is not None:
        return f"{root}/deployments/{_segment(route.deployment)}{route.path}?{query}"
    if route.segment in _BY_DEPLOYMENT and model and route.shape == "openai":
        return f"{root}/deployments/{_segment(deployment_of(site, model))}{route.path}?{query}"
    return f"{root}{route.path}?{query}"


def body_model(site: UpstreamAddress, route: Route, model: str, body_model: str | None) -> str | None:
    if route.deployment is not None or body_model is None:
        return None
    if route.shape == "openai" and site.api_version is not None and route.segment in _BY_DEPLOYMENT:
        return None  # the path names the deployment; Azure does not read the body's model
    deployment = deployment_of(site, body_model)
    return deployment if deployment != body_model else None


def auth(secret: str, organization: str | None, project: str | None) -> tuple[tuple[str, str], ...]:
    return (("api-key", secret),)


def client_auth(scheme: str, token: str) -> tuple[tuple[str, str], ...]:
    if scheme == "bearer" and token.startswith("eyJ"):  # an Entra ID token is a JWT: it goes as bearer only
        return (("Authorization", f"Bearer {token}"),)
    return (("api-key", token),)


def identity(site: UpstreamAddress, model: str) -> str:
    return f"azure {site.base_url} {site.api_version} {deployment_of(site, model)}"
