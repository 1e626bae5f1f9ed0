"""Takes pool keys out of headers and bodies."""

from __future__ import annotations

from collections.abc import Iterable


class SecretMasker:
    """Replaces the pool's keys in upstream responses and log lines by `***` (`docs/security.md`)."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets: tuple[bytes, ...] = ()
        self.add(secrets)

    def add(self, secrets: Iterable[str], instead_of: Iterable[str] = ()) -> None:
        """Mask these secrets, too. instead_of: those that need not be masked any more."""
        gone = {secret.encode() for secret in instead_of}
        known = {*self._secrets, *(secret.encode() for secret in secrets if len(secret) >= 4)} - gone
        # The longest first: masking a key that begins like another would leave the other's tail.
        self._secrets = tuple(sorted(known, key=len, reverse=True))
        self._texts = tuple(secret.decode() for secret in self._secrets)

    def found_in(self, data: bytes) -> bool:
        for secret in self._secrets:  # noqa: SIM110 - a generator costs ten times as much
            if secret in data:
                return True
        return False

    def mask_text(self, text: str) -> str:
        """Return a text of the log with all secrets masked."""
        for secret in self._texts:
            if secret in text:
                text = text.replace(secret, "***")
        return text

    def mask(self, data: bytes) -> bytes:
        for secret in self._secrets:
            if secret in data:
                data = data.replace(secret, b"***")
        return data
