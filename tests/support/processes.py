"""What tests ask about processes."""

from pathlib import Path


def is_running(pid: int) -> bool:
    """Whether there is such a process and it has not ended, be it seen by its parent or not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
