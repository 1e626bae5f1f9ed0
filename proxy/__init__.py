"""A local, OpenAI-compatible caching proxy. (The architecture follows here once the rooms are furnished.)"""

__version__ = "0.1.0"
