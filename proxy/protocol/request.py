"""The values that travel through the journey: who calls, what for, and what goes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson

from .headers import Raw
from .json_edit import set_field
from .options import Options
from .routes import Route


@dataclass(frozen=True, slots=True)
class Client:
    """Who calls. name: the client key's, '' when anonymous; scope: what separates this client's cache from others';
    auth: (`bearer` or `api-key`, token) of a pass-through client's own credential, to go upstream;
    models: globs of those it may use, none: all."""

    name: str = ""
    cache_partition: str = ""
    auth: tuple[str, str] | None = None
    models: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Client(name={self.name!r})"


class ProxyRequest(msgspec.Struct, frozen=True):
    """One request to one of the five endpoints, read and understood. arrived, deadline: monotonic seconds;
    patience: seconds it may wait for a key."""

    id: str
    route: Route
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

    @property
    def endpoint(self) -> str:
        return self.route.endpoint

    def with_input(self, given: bytes) -> ProxyRequest:
        """The call with another `input` (JSON text), every other byte of its body as it is."""
        document = {**self.document, "input": orjson.loads(given)}
        return msgspec.structs.replace(self, body=set_field(self.body, "input", given), document=document)
