"""Usage and cost of every request in a SQLite file."""
