"""Where stored answers are kept. A backend is one file here and one line in `build.py`."""
