"""Keys as they may be written: upstream keys, client keys and the admin key."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from typing import Any, Protocol

from .limits import Limits
from .problems import Invalid, SourceLocation
from .reading import ListOf, MapByGlob, Reader, Reading, Section, Single, kind_of, scalar
from .secret import Secret, read_key_file, unusable_key
from .settings import ClientKeySettings
from .tree import Listing, Node, Scalar, Table
from .values import GLOB, HEADER_ID, MONEY, NAME, PATH, SECRET_TEXT, SHA256, TEXT, VISIBLE, integer, number, optional

SHORT_CLIENT_KEY = 16

LIMITS: Section[Limits] = Section(
    Limits, {name: Single(optional(integer(1))) for name in ("rpm", "tpm", "rpd", "tpd", "concurrency")}
)
LIMITS_BY_GLOB: MapByGlob[Limits] = MapByGlob(GLOB, LIMITS)


class KeyLimits(MapByGlob[Limits]):
    """The limits of one key: plain ones hold for every model, else they are given by model."""

    def __init__(self) -> None:
        super().__init__(GLOB, LIMITS)

    def read(self, node: Node, path: str, reading: Reading) -> dict[str, Limits]:
        if isinstance(node, Table) and not any(isinstance(child, Table) for _, child in node.entries):
            limits = LIMITS.read(node, path, reading)
            return {} if limits == Limits() else {"*": limits}
        return super().read(node, path, reading)


@dataclass(frozen=True, slots=True)
class RawKey:
    """A key of an upstream as the file has it."""

    name: str | None = None
    key: str | None = None
    key_file: str | None = None
    key_command: tuple[str, ...] = ()
    organization: str | None = None
    project: str | None = None
    weight: float = 1.0
    quota: str | None = None
    limits: Mapping[str, Limits] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """A key of the pool before it has its label, and where it was written."""

    secret: str = field(repr=False)
    written: RawKey = field(repr=False)
    path: str
    where: SourceLocation


_GIVEN: Mapping[str, Reader[Any]] = {
    "key": Single(optional(SECRET_TEXT)),
    "key_file": Single(optional(PATH)),
    "key_command": ListOf(TEXT),
}
_WRITTEN_KEY: Section[RawKey] = Section(
    RawKey,
    {
        "name": Single(optional(NAME)),
        **_GIVEN,
        "organization": Single(optional(HEADER_ID)),
        "project": Single(optional(HEADER_ID)),
        "weight": Single(number(1e6)),
        "quota": Single(optional(NAME)),
        "limits": KeyLimits(),
    },
)


class KeySource(Protocol):
    """The three ways to give a key, of which one is taken."""

    @property
    def key(self) -> str | None: ...
    @property
    def key_file(self) -> str | None: ...
    @property
    def key_command(self) -> tuple[str, ...]: ...


def read_key(given: KeySource, where: SourceLocation, reading: Reading) -> str:
    """The text of `key`, what `key_file` holds, or what `key_command` prints. Raises Invalid unless it is one of
    them.
    """
    ways = [given.key is not None, given.key_file is not None, bool(given.key_command)]
    if sum(ways) != 1:
        raise Invalid(f"expected one of key, key_file and key_command, found {'several' if any(ways) else 'none'}")
    if given.key is not None:
        return given.key
    if given.key_command:
        return reading.command(where, given.key_command)
    text, warning = read_key_file(reading.watch(where, given.key_file or ""))
    if warning:
        reading.warn(warning)
    return text


class Keys:
    """The keys of one upstream, before they have labels. A text with commas is several keys."""

    def read(self, node: Node, path: str, reading: Reading) -> tuple[ParsedKey, ...]:
        if isinstance(node, Scalar) and node.null:
            return ()
        drafts: list[ParsedKey] = []
        for i, item in enumerate(node.items if isinstance(node, Listing) else (node,)):
            inner = f"{path}.{i}"
            reading.places[inner] = item.where
            try:
                drafts += self._item(item, inner, reading)
            except Invalid as error:
                reading.fail(item.where, inner, str(error))
        return tuple(drafts)

    def _item(self, node: Node, path: str, reading: Reading) -> list[ParsedKey]:
        if isinstance(node, Scalar):
            written = RawKey()
            text = scalar(node, SECRET_TEXT, reading)
            if not text and ":-" in node.text:
                return []  # ${NAME:-}: says itself that there may be none
        elif isinstance(node, Table):
            written = _WRITTEN_KEY.read(node, path, reading)
            if not reading.sound(path):
                return []
            text = read_key(written, node.where, reading)
        else:
            raise Invalid(f"expected a key, or a table with key, key_file or key_command; found {kind_of(node)}")
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts:
            raise Invalid("expected a key, found an empty text")
        several = len(parts) > 1
        return [
            ParsedKey(part, _numbered(written, i) if several else written, path, node.where)
            for i, part in enumerate(parts, 1)
        ]

    def show(self, value: Any) -> object:
        """Of finished keys: each by its label, and only what is not the default."""
        shown = []
        for key in value:
            entry: dict[str, object] = {"name": key.label, "key": str(key.secret)}
            entry |= {n: v for n in ("organization", "project") if (v := getattr(key, n))}
            entry |= {"weight": key.weight} if key.weight != 1.0 else {}
            entry |= {"quota": key.quota} if key.quota != key.label else {}
            entry |= {"limits": LIMITS_BY_GLOB.show(key.limits)} if key.limits else {}
            shown.append(entry)
        return shown


def _numbered(written: RawKey, i: int) -> RawKey:
    if written.name is None:
        return written
    return RawKey(
        name=f"{written.name}-{i}",
        organization=written.organization,
        project=written.project,
        weight=written.weight,
        quota=written.quota,
        limits=written.limits,
    )


@dataclass(frozen=True, slots=True)
class _ClientLimits:
    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    usd_per_day: Decimal | None = None


@dataclass(frozen=True, slots=True)
class _WrittenClient:
    name: str | None = None
    key: str | None = None
    key_file: str | None = None
    key_command: tuple[str, ...] = ()
    key_sha256: bytes | None = None
    namespace: str | None = None
    models: tuple[str, ...] = ()
    limits: _ClientLimits = field(default_factory=_ClientLimits)


_WRITTEN_CLIENT: Section[_WrittenClient] = Section(
    _WrittenClient,
    {
        "name": Single(optional(NAME)),
        **_GIVEN,
        "key_sha256": Single(optional(SHA256)),
        "namespace": Single(optional(VISIBLE)),
        "models": ListOf(GLOB),
        "limits": Section(
            _ClientLimits,
            {
                **{name: Single(optional(integer(1))) for name in ("rpm", "tpm", "concurrency")},
                "usd_per_day": Single(optional(MONEY)),
            },
        ),
    },
)


class ClientKeys:
    """Who may call: names and keys are each unique."""

    def read(self, node: Node, path: str, reading: Reading) -> tuple[ClientKeySettings, ...]:
        if isinstance(node, Scalar) and node.null:
            return ()
        if not isinstance(node, Listing):
            raise Invalid(f"expected a list of client keys, found {kind_of(node)}")
        clients: list[ClientKeySettings] = []
        for i, item in enumerate(node.items):
            inner = f"{path}.{i}"
            reading.places[inner] = item.where
            try:
                client = self._client(item, inner, i + 1, reading)
                if client is None:
                    continue
                if any(other.name == client.name for other in clients):
                    raise Invalid(f"expected a name of its own, found {client.name} again")
                if any(other.digest == client.digest for other in clients):
                    raise Invalid(f"expected a key of its own, found that {client.name} has another client's")
                clients.append(client)
            except Invalid as error:
                reading.fail(item.where, inner, str(error))
        return tuple(clients)

    def _client(self, node: Node, path: str, ordinal: int, reading: Reading) -> ClientKeySettings | None:
        if not isinstance(node, Table):
            raise Invalid(f"expected a table with name and key, found {kind_of(node)}")
        written = _WRITTEN_CLIENT.read(node, path, reading)
        if not reading.sound(path):
            return None
        name = written.name or f"client-{ordinal}"
        own = written.limits
        limits = Limits(rpm=own.rpm, tpm=own.tpm, concurrency=own.concurrency)
        if written.key_sha256 is not None:
            if written.key is not None or written.key_file is not None or written.key_command:
                raise Invalid("expected one of key, key_file, key_command and key_sha256, found several")
            return ClientKeySettings(
                name, written.key_sha256, written.namespace, written.models, limits, own.usd_per_day
            )
        key = usable(f"the key of {name}", read_key(written, node.where, reading).strip())
        if len(key) < SHORT_CLIENT_KEY:
            reading.warn(f"the key of {name} is short: {SHORT_CLIENT_KEY} characters and more are hard to guess")
        digest = hashlib.sha256(key.encode()).digest()
        return ClientKeySettings(name, digest, written.namespace, written.models, limits, own.usd_per_day)

    def show(self, value: Any) -> object:
        return [
            {"name": client.name, "key": "***"}
            | ({"namespace": client.namespace} if client.namespace else {})
            | ({"models": list(client.models)} if client.models else {})
            | ({"limits": shown} if (shown := _given(client)) else {})
            for client in value
        ]


def _given(client: ClientKeySettings) -> dict[str, object]:
    money = None if client.usd_per_day is None else MONEY.show(client.usd_per_day)
    limits = asdict(client.limits) | {"usd_per_day": money}
    return {name: limit for name, limit in limits.items() if limit is not None}


@dataclass(frozen=True, slots=True)
class _WrittenAdmin:
    key: str | None = None
    key_file: str | None = None
    key_command: tuple[str, ...] = ()


class AdminKey:
    """A key as plain text, or a table with key, key_file or key_command; nothing: none."""

    _table: Section[_WrittenAdmin] = Section(_WrittenAdmin, _GIVEN)

    def read(self, node: Node, path: str, reading: Reading) -> Secret | None:
        if isinstance(node, Table):
            written = self._table.read(node, path, reading)
            if not reading.sound(path):
                return None
            text: str | None = read_key(written, node.where, reading)
        else:
            text = scalar(node, optional(SECRET_TEXT), reading)
        return None if text is None else Secret(usable("the admin key", text.strip()))

    def show(self, value: Any) -> object:
        return "" if value is None else str(value)


def usable(name: str, key: str) -> str:
    """The key itself. Raises Invalid, naming it by its label, if it cannot be one."""
    if reason := unusable_key(key):
        raise Invalid(f"expected a key, found that {name} {reason}")
    return key
