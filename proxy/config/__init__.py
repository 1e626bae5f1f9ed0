"""Settings: `load()` makes frozen, checked values of all sources, or says all that is wrong.

    file, variables, flags         tree.py, environment.py: trees of texts that know their place
    -> read by a table of readers  schema.py over values.py, keys.py, upstreams.py; machinery: reading.py
    -> values                      settings.py
    -> rules over several values   validate.py; at a reload also with what stays: fixed.py

Own readers rather than msgspec or pydantic: the type of a setting decides how its text is read (`off` may be
a word or false), every mistake carries the line of its value, and no secret may get into a message.
"""

from .fixed import with_fixed
from .loader import FLAGS, Loaded, load
from .problems import Problem, SettingsError
from .secret import Secret
from .settings import ClientKey, Key, Settings, Upstream

__all__ = [
    "FLAGS",
    "ClientKey",
    "Key",
    "Loaded",
    "Problem",
    "Secret",
    "Settings",
    "SettingsError",
    "Upstream",
    "load",
    "with_fixed",
]
