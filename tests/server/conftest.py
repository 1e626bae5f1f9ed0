"""The transport on real sockets, as in the tests of `upstream`."""

from tests.upstream.conftest import up

__all__ = ["up"]
