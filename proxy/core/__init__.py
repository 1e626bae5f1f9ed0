"""Pure decisions over frozen values: no clock, no IO, no asyncio, no aiohttp. `now` is an argument. Imports only
itself.
"""
