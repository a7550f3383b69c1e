"""Progress while a server starts: a live line in a terminal, otherwise a line every ten seconds."""

import re
from types import TracebackType

from rich.console import Console
from rich.markup import escape

SECONDS_BETWEEN_LINES = 10.0
LOG_PREFIX = re.compile(r"^.*?\[[\w.]+:\d+\] ")  # "(Worker pid=7) INFO 11-23 19:31:25 [file.py:68] "


class Progress:
    """A context manager; call it repeatedly with the elapsed seconds and the last line of the log."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.status = console.status("starting")
        self.next_line = 0.0

    def __enter__(self) -> "Progress":
        self.status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __call__(self, seconds: float, line: str) -> None:
        """Show the time and the line, truncated to the width."""
        text = f"{seconds:4.0f} s  {escape(LOG_PREFIX.sub('', line)[: max(20, self.console.width - 14)])}"
        if self.console.is_terminal:
            self.status.update(text)
        elif seconds >= self.next_line:
            self.next_line = seconds + SECONDS_BETWEEN_LINES
            self.console.print(f"     {text}", soft_wrap=True)

    def stop(self) -> None:
        """Remove the live line."""
        self.status.stop()
