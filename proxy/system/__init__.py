"""What touches the machine: clock, threads, sockets, the Redis connection, SQLite files."""
