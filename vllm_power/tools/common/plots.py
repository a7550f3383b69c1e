"""Reproducible plots: the same rows give the same file."""

from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """matplotlib.pyplot for SVG without dates and random ids."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "vllm-power"
    import matplotlib.pyplot

    return matplotlib.pyplot


def save(figure: Any, path: Path) -> Path:
    """Write ``figure`` to ``path`` and close it. Returns the path."""
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot().close(figure)
    return path
