"""The credential headers of requests to the upstreams."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..protocol.request import Client
from .retry.outcome import TransportFailure
from .target import Upstream

Headers = tuple[tuple[str, str], ...]


class Credentials:
    """Finds the credential headers of a request.

    by_label: the headers of each pool key, by its label; those of an upstream with Entra ID come and go.
    of_client: the client's own credential is sent in place of a pool key. mask: takes pool keys out of a text.
    """

    def __init__(
        self, by_label: Mapping[str, Headers], of_client: bool, mask: Callable[[str], str] = lambda text: text
    ) -> None:
        self._by_label = by_label
        self.mask = mask
        self._of_client = of_client

    def headers(self, label: str, upstream: Upstream, client: Client) -> Headers:
        """Return the headers to send with the key of this label. Raises TransportFailure if a token is not there."""
        if self._of_client:
            return upstream.provider.client_auth(*client.auth) if client.auth else ()
        found = self._by_label.get(label)
        if found is None:
            raise TransportFailure("unreached", "there is no Entra ID token yet")
        return found
