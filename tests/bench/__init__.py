"""How fast the proxy is, beside plain aiohttp on the same machine in the same minute: `python -m tests.bench`."""
