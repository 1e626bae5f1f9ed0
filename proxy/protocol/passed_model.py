"""Which model runs on a route that is passed through, as far as path and query say (`docs/routes-and-errors.md`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote

from .routes import Route, query_values

_NO_MODEL: Final = frozenset({"containers", "conversations", "files", "models", "uploads"})
"""Segments of routes on which no model runs."""

_NOT_IN_BODY: Final = frozenset({"batches", "chatkit", "evals", "organization", "vector_stores"})
"""Segments of routes whose models are named elsewhere than in the field `model` of the body."""

_IN_PATH: Final = re.compile(r"/(?:models/(.+)|engines/([^/]+)/.+)\Z")
_STORED_CHAT: Final = re.compile(r"/chat/completions/[^/]+(?:/messages)?\Z")
_COUNTS_TOKENS: Final = "/responses/input_tokens"


def runs_model(route: Route, method: str) -> bool:
    """Return whether a request may run a model."""
    if method in ("GET", "HEAD", "DELETE", "OPTIONS") or route.segment in _NO_MODEL or route.path.endswith("/cancel"):
        return False
    if route.segment == "responses":
        return route.path != _COUNTS_TOKENS and route.path.count("/") == 2
    return _STORED_CHAT.match(route.path) is None


def names_model(route: Route, method: str) -> bool:
    """Return whether the body of a request may name its model."""
    return route.segment not in _NOT_IN_BODY and (
        runs_model(route, method) or (method == "POST" and route.path == _COUNTS_TOKENS)
    )


def model_in_target(route: Route) -> str:
    """Return the model that the path or the query names, apart from a deployment; "" for none."""
    found = _IN_PATH.match(route.path)
    if found is not None:
        return unquote(found[1] or found[2])
    return next((name for name in query_values(route.query, "model") if name), "") if route.query else ""


def model_in_session(document: Mapping[str, object]) -> str:
    """Return the model that a body of the Realtime API names for its session; "" for none."""
    session = document.get("session")
    model = session.get("model") if isinstance(session, Mapping) else None
    return model if isinstance(model, str) else ""
