"""The values that travel through the journey: who calls, what for, and what goes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import orjson

from .edit import set_field
from .headers import Raw
from .items import Batch
from .options import Options
from .routes import Route

CacheStatus = Literal["hit", "miss", "bypass", "partial", "coalesced"]


@dataclass(frozen=True, slots=True)
class Client:
    """Who calls. name: the client key's, '' when anonymous; scope: what separates this client's cache from others';
    auth: (`bearer` or `api-key`, token) of a pass-through client's own credential, to go upstream;
    models: globs of those it may use, none: all."""

    name: str = ""
    scope: str = ""
    auth: tuple[str, str] | None = None
    models: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Client(name={self.name!r})"


class Call(msgspec.Struct, frozen=True):
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
    patience: float

    @property
    def endpoint(self) -> str:
        return self.route.endpoint

    def with_input(self, given: bytes) -> Call:
        """The call with another `input` (JSON text), every other byte of its body as it is."""
        document = {**self.document, "input": orjson.loads(given)}
        return msgspec.structs.replace(self, body=set_field(self.body, "input", given), document=document)


class CachePlan(msgspec.Struct, frozen=True):
    """What the cache may do for a call. key: '' where it may do nothing; reason: why a miss or bypass;
    read, write: allowed; forward: the `fwd` of Cache-Status (RFC 9211 section 2.2); batch: the items of the request,
    where each has an entry of its own; traits: of `core.explain`; bare: the key less the client's scope, '' where that
    is the key; request: the canonical body, where it is to be stored; collapsed: another's upstream call answers it."""

    key: str
    reason: str
    read: bool
    write: bool
    forward: str = "uri-miss"
    batch: Batch | None = None
    traits: str = ""
    bare: str = ""
    request: str | None = None
    collapsed: bool = False

    @property
    def status(self) -> CacheStatus:
        if self.collapsed:
            return "coalesced"
        if self.batch is not None and self.batch.found:
            return "partial"
        return "miss" if self.key else "bypass"
