"""One of several workers, as the parent starts it (proxy/workers): never by hand, so it is no command."""

from __future__ import annotations

import asyncio
import sys


def main() -> int:
    """The exit status. The one argument: the file descriptor of our end of the wire to the parent."""
    from ..lifecycle import run_worker

    return asyncio.run(run_worker(int(sys.argv[1])))
