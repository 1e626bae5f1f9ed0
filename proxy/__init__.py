"""A local caching proxy for the OpenAI and Azure OpenAI APIs: `OPENAI_BASE_URL` points here, and nothing else changes.

Imports go from left to right, and never back::

    cli -> lifecycle -> app -> server -> pipeline -> upstream -> accounting -> cache -> config -> protocol, cost, system

`pipeline/handler.py` has the story of a request, from top to bottom. `docs/architecture.md` has one request's way
through the files, a table of what goes where, and the rules. `tests/test_architecture.py` holds the code to them.
"""

__version__ = "0.1.0"
