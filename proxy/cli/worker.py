"""The entry point of a worker process; only the supervisor starts it (proxy/workers), so it is not a command."""

from __future__ import annotations

import asyncio
import sys


def main() -> int:
    """Run a worker and return its exit status. `sys.argv[1]`: the file descriptor of the link to the supervisor."""
    from ..lifecycle import run_worker

    return asyncio.run(run_worker(int(sys.argv[1])))
