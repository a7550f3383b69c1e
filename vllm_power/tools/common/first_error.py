"""Find the first error in vLLM's log.

vLLM runs in several processes. The one that ends last says only "Engine core initialization failed. See root cause
above", hundreds of lines below the cause. Standard library only, because the image's start script uses this module as
well.
"""

import re
from pathlib import Path

from vllm_power.tools.common.ended import ended

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# "(EngineCore pid=7) ERROR 11-23 19:31:25 [core.py:68] "; a traceback printed by Python has the process alone.
PREFIX = re.compile(r"^(?:\([^)]*\) )?(?:(?P<level>[A-Z]+) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]+\] ?)?")
EXCEPTION = re.compile(r"^(?P<kind>(?:[A-Za-z_][\w.]*)?(?:Error|Exception))(?::(?: (?P<text>.*))?)?$")
USAGE = re.compile(r"^[\w .-]+: error: (?P<text>.+)$")  # argparse
# Errors that only report another process's.
SECONDARY = re.compile(
    r"See root cause above|See the error above|initialization failed due to|EngineDeadError"
)
CORE_PROCESSES = re.compile(r"Failed core proc\(s\): \{(?P<processes>[^}]*)\}")
PROCESS = re.compile(r"'(?P<name>[^']+)': (?P<status>-?\d+)")
OUT_OF_MEMORY = "; the kernel ends a process so if the machine or the container runs out of memory"
# What helps against errors whose own sentence does not say it.
REMEDIES = {
    r"requires the Torchvision library": "this model reads images: pip install torchvision (without a GPU, with "
    "--index-url https://download.pytorch.org/whl/cpu), or serve its language model alone with --language-model-only",
    r"instantiate the backend tokenizer|Failed to load the tokenizer|untagged enum ModelWrapper": "the model's "
    "tokenizer cannot be loaded: put the original's tokenizer files into its folder, or name another with --tokenizer",
}
MOST_LINES, MOST_CHARACTERS = 6, 1000


class FirstError:
    """Reads a log line by line; ``sentence`` is what the first error says."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._open = False  # whether the error may continue on the next line
        self._secondary: str | None = None

    def feed(self, line: str) -> None:
        """Read the log's next line."""
        line = COLOUR.sub("", line.rstrip())
        prefix = PREFIX.match(line)
        assert prefix  # it matches an empty beginning too
        level, text = prefix["level"], line[prefix.end() :]
        if self._lines:
            self._continue(level, text)
        elif level in (None, "ERROR", "CRITICAL"):
            self._begin(text)

    @property
    def sentence(self) -> str | None:
        """The first error, on one line; None if there is none."""
        if not self._lines:
            return self._secondary
        text = " ".join(part for line in self._lines if (part := line.strip()))
        # pydantic counts the errors and names their types and a web page; the sentence is between.
        if stated := re.search(r"(?:Value|Assertion) error, (.*?) \[type=", text):
            text = stated[1]
        text = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ..."
        remedy = next((help for sign, help in REMEDIES.items() if re.search(sign, text)), None)
        return f"{text} -> {remedy}" if remedy else text

    def _begin(self, text: str) -> None:
        usage, found = USAGE.match(text), EXCEPTION.match(text)
        if usage:
            self._lines = [usage["text"]]
        elif found and ((found["text"] is None and not text.endswith(":")) or SECONDARY.search(text)):
            self._secondary = self._secondary or _of_processes(text)
        elif found:
            self._lines, self._open = [text], True

    def _continue(self, level: str | None, text: str) -> None:
        ends = (
            not text
            or level not in (None, "ERROR", "CRITICAL")
            or re.match(r"Traceback|During|The above", text)
        )
        self._open = self._open and not ends and len(self._lines) < MOST_LINES and not EXCEPTION.match(text)
        if self._open:
            self._lines.append(text)


def first_error(log: Path) -> str | None:
    """Return the sentence of the first error in a log; None if there is none."""
    found = FirstError()
    with log.open(errors="replace") as lines:
        for line in lines:
            found.feed(line)
    return found.sentence


def _of_processes(text: str) -> str:
    """The content of vLLM's last error: its own text, or the signals that ended its processes."""
    listed = CORE_PROCESSES.search(text)
    killed = [
        f"vLLM's process {process['name']} {ended(status)}" + (OUT_OF_MEMORY if status == -9 else "")
        for process in PROCESS.finditer(listed["processes"] if listed else "")
        if (status := int(process["status"])) < 0
    ]
    return ", ".join(killed) or text
