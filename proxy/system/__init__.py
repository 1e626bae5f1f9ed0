"""Clock, Redis connection, SQLite file, sockets: what touches the machine."""
