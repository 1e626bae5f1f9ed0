"""A process that fills a cache file until it is killed: `writer_process.py FILE NUMBER`. Each body proves its key."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import sys
import time

from proxy.cache.stores.sqlite import SQLiteStore
from tests.cache.stores.kit import entry


def body_of(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest() * (1 + len(key) * 7 % 50)


async def main(path: str, number: str) -> None:
    store = SQLiteStore(path, 2**23, 2**20)
    await store.open()
    print("ready", (await store.stats())["state"], flush=True)
    while True:
        key = f"{number}-{random.randrange(2000)}-{'x' * random.randrange(100)}"
        store.put(entry(key, body_of(key) + os.urandom(random.randrange(4000)), stored_at=time.time()))
        await asyncio.sleep(0)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
