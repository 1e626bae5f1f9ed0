"""One request from plan to reply. Start with `handler.py`."""
