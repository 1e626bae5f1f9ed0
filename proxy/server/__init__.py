"""The HTTP server: listeners, access control, API and admin routes. Only it and `upstream.client` use aiohttp."""
