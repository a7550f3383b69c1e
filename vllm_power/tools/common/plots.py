"""Plots that are the same file for the same rows."""

from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """matplotlib.pyplot, drawing svg without dates and random names."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "vllm-power"
    import matplotlib.pyplot

    return matplotlib.pyplot


def save(figure: Any, path: Path) -> Path:
    """Write ``figure`` to ``path``, close it and return the path."""
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot().close(figure)
    return path
