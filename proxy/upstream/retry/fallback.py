"""Other models for a request that its own model cannot answer (`retry.fallbacks`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import msgspec
import orjson

from ...protocol.json_edit import set_field
from ...protocol.request import ProxyRequest


def fallbacks_for(table: Mapping[str, tuple[str, ...]], model: str) -> tuple[str, ...]:
    """Return the models to try instead: by exact name, else by the longest matching glob; never the model itself."""
    found = table.get(model)
    if found is None:
        globs = [glob for glob in table if fnmatchcase(model, glob)]
        found = table[max(globs, key=len)] if globs else ()
    return tuple(other for other in found if other != model)


def with_model(request: ProxyRequest, model: str) -> ProxyRequest:
    """Return the request for another model; a deployment in its path is dropped."""
    route = request.route
    if route.deployment is not None:
        route = replace(route, deployment=None, shape="openai")
    return msgspec.structs.replace(
        request,
        route=route,
        body=set_field(request.body, "model", orjson.dumps(model)),
        document={**request.document, "model": model},
        model=model,
        body_model=model,
    )
