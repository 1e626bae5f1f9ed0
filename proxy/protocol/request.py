"""A request of a client to one of the cached endpoints, as values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson

from .errors import ProxyError
from .headers import Raw
from .json_edit import set_field
from .json_parse import parse_leniently
from .options import Options
from .routes import Route


@dataclass(frozen=True, slots=True)
class Client:
    """The sender of a request.

    name: that of its client key, "" if it is anonymous.
    cache_partition: part of the cache key, so that this client's entries are its own.
    auth: (`bearer` or `api-key`, token) that goes upstream in pass-through.
    models: globs of the models it may use; all if there are none.
    """

    name: str = ""
    cache_partition: str = ""
    auth: tuple[str, str] | None = None
    models: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Client(name={self.name!r})"


class ProxyRequest(msgspec.Struct, frozen=True):
    """One request to one of the cached endpoints, parsed.

    endpoint: the route's. headers: as they came. body: as it came; document: the same, parsed.
    model: the body's, else that of the Azure deployment in the path; body_model: the body's alone.
    wants_usage: it asked for a stream's usage chunk.
    arrived, deadline: monotonic seconds. act_until: as in `SharedDeadline`. max_wait: seconds it may wait for a key.
    """

    id: str
    route: Route
    endpoint: str
    headers: Sequence[Raw]
    body: bytes
    document: Mapping[str, Any]
    model: str
    body_model: str | None
    stream: bool
    wants_usage: bool
    options: Options
    client: Client
    arrived: float
    deadline: float
    max_wait: float
    act_until: float = math.inf

    @classmethod
    def from_body(
        cls,
        body: bytes,
        document: Mapping[str, Any],
        model_of: Callable[[Route, str | None], str],
        *,
        route: Route,
        headers: Sequence[Raw],
        options: Options,
        client: Client,
        id: str = "",
        arrived: float = 0.0,
        deadline: float = 0.0,
        max_wait: float = 0.0,
        act_until: float = math.inf,
    ) -> ProxyRequest:
        """Return the request that `body` makes; the keyword arguments are the fields that no body says.

        document: `parse_body(body)`. model_of: the model of a route and a body's `model`.
        """
        named = document.get("model")
        body_model = named if isinstance(named, str) else None
        stream_options = document.get("stream_options")
        return cls(
            id=id,
            route=route,
            endpoint=route.endpoint,
            headers=headers,
            body=body,
            document=document,
            model=model_of(route, body_model),
            body_model=body_model,
            stream=document.get("stream") is True,
            wants_usage=isinstance(stream_options, dict) and stream_options.get("include_usage") is True,
            options=options,
            client=client,
            arrived=arrived,
            deadline=deadline,
            max_wait=max_wait,
            act_until=act_until,
        )

    def with_input(self, input_json: bytes) -> ProxyRequest:
        """Return the request with another `input` (JSON text); every other byte of its body stays."""
        document = {**self.document, "input": orjson.loads(input_json)}
        return msgspec.structs.replace(self, body=set_field(self.body, "input", input_json), document=document)


def parse_body(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a request body. Raises `ProxyError("invalid_json")`."""
    try:
        document = parse_leniently(body)
    except ValueError:
        raise ProxyError("invalid_json", "the request body is not valid JSON") from None
    if not isinstance(document, dict):
        raise ProxyError("invalid_json", "the request body must be a JSON object")
    return document
