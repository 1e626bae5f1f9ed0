"""What differs between OpenAI and Azure. A provider is one file here and one line in `registry.py`."""
