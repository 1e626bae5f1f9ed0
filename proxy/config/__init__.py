"""Settings: text to frozen values, all errors at once. Start with `loader.py`."""
