"""What the image's programs (`docker/serve.py`, `docker/health.py`) are made of. Standard library only."""
