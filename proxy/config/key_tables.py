"""How keys, clients and limits are written: the descriptions of their tables."""

from __future__ import annotations

from typing import Final

from .description import ListOf, MapOf, OneOf, Section, Setting, optional
from .limits import Limits
from .values import GLOB, HEADER_ID, MONEY, NAME, PATH, SECRET_TEXT, SHA256, TEXT, VISIBLE, integer, number

_LIMIT: Final = optional(integer(1))
_LIMITS: Final = {
    "rpm": Setting(_LIMIT, "Requests a minute."),
    "tpm": Setting(_LIMIT, "Tokens a minute."),
    "rpd": Setting(_LIMIT, "Requests a day."),
    "tpd": Setting(_LIMIT, "Tokens a day."),
    "concurrency": Setting(_LIMIT, "Requests at the same time."),
}
LIMITS: Final = Section(_LIMITS, Limits)
LIMITS_BY_GLOB: Final = MapOf(GLOB, LIMITS)
KEY_LIMITS: Final = OneOf((LIMITS, LIMITS_BY_GLOB))

KEY_WAYS: Final = {
    "key": Setting(optional(SECRET_TEXT), "The key itself."),
    "key_file": Setting(optional(PATH), "A file that holds the key; the proxy follows its changes."),
    "key_command": Setting(ListOf(TEXT), "A command that prints the key: its arguments, no shell, at most 10 s.", ()),
}
"""The ways to give a key. One of them is needed."""

KEY: Final = Section(
    {
        "name": Setting(optional(NAME), "Label in headers and logs; default: the upstream's name and a number."),
        **KEY_WAYS,
        "organization": Setting(optional(HEADER_ID), "OpenAI organization to send with the key."),
        "project": Setting(optional(HEADER_ID), "OpenAI project to send with the key."),
        "weight": Setting(number(1e6), "Share of requests with `selection: weighted`; 0: only if no other can.", 1.0),
        "quota": Setting(optional(NAME), "Keys that name the same quota share its limits; default: the label."),
        "limits": Setting(KEY_LIMITS, "Limits of this key, for all models or by model.", {}),
    }
)
KEYS: Final = OneOf((SECRET_TEXT, ListOf(OneOf((SECRET_TEXT, KEY)))))
ADMIN_KEY: Final = OneOf((optional(SECRET_TEXT), Section(KEY_WAYS)))

_CLIENT_LIMITS: Final = {name: _LIMITS[name] for name in ("rpm", "tpm", "concurrency")}
CLIENT: Final = Section(
    {
        "name": Setting(optional(NAME), "Name in logs and receipts; default: client-1, client-2 …"),
        **KEY_WAYS,
        "key_sha256": Setting(optional(SHA256), "SHA-256 of the key instead of the key."),
        "namespace": Setting(optional(VISIBLE), "Clients that name the same one share cached responses."),
        "models": Setting(ListOf(GLOB), "Models that the client may ask for; none: all.", ()),
        "limits": Setting(
            Section(_CLIENT_LIMITS | {"usd_per_day": Setting(optional(MONEY), "USD a day (UTC).")}),
            "Limits of what goes upstream for this client; cached responses are free.",
            {},
        ),
    }
)
CLIENT_KEYS: Final = ListOf(CLIENT)
