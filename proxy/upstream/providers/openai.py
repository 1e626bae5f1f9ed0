"""The OpenAI API and compatible servers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...protocol.routes import REALTIME, Route, Shape, replaced_query

if TYPE_CHECKING:
    from .interface import UpstreamAddress


def url(address: UpstreamAddress, route: Route, model: str) -> str:
    query = route.query
    if route.shape != "openai" and query:  # an Azure client's api-version means nothing here
        query = "&".join(part for part in query.split("&") if not part.startswith("api-version="))
        if route.path == REALTIME and model:  # Azure's query names a deployment, OpenAI's a model
            query = replaced_query(query, {"deployment", "model"}, ("model", model))
    return address.base_url + route.path + (f"?{query}" if query else "")


def body_model(address: UpstreamAddress, route: Route, model: str, body_model: str | None) -> str | None:
    return model if body_model is None and model else None


def auth(secret: str, organization: str | None, project: str | None) -> tuple[tuple[str, str], ...]:
    headers = [("Authorization", f"Bearer {secret}")]
    if organization:
        headers.append(("OpenAI-Organization", organization))
    if project:
        headers.append(("OpenAI-Project", project))
    return tuple(headers)


def client_auth(scheme: str, token: str) -> tuple[tuple[str, str], ...]:
    return (("Authorization", f"Bearer {token}"),)


def deployment(address: UpstreamAddress, route: Route, model: str) -> str | None:
    return None


def identity(address: UpstreamAddress, model: str, shape: Shape) -> str:
    return f"openai {address.base_url}"
