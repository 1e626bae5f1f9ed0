"""Settings that are read and checked already, but whose feature is still to be built.

Set to anything but the default (or one of the values beside the path here) they are refused with "not yet
available", because a setting that silently does nothing misleads. Who builds a feature takes its lines out.
Missing on purpose: what only switches off something that is not built (`throttle.adaptive: false`): it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

NOT_YET: Final[Mapping[str, tuple[object, ...]]] = {}
