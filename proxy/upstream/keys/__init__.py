"""The pool of keys: their states, which one serves a request, who made a stored object."""
