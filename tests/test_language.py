"""The language rule of CONTRIBUTING.md: slips that a word list can find, in documentation, comments and strings."""

import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# {pattern: what to write instead}, applied to lines of text without regard to case.
SLIPS = {
    r"\bcan not\b": "cannot",
    r"\banew\b": "again",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\b(go|goes|going|went) on\b(?! (top|to|with))": "continue",
    r"\bhand(s|ed|ing)? on\b": "pass",
    r"\balike\b": "in the same way, or both",
    r"\bby itself\b": "automatically, or alone",
    r"\bso many\b": "the number",
    r"\bbeside\b": "next to, or in addition to",
    r"\bat hand\b": "this, or available",
    r"\bin (the )?place of\b": "instead of",
    r"\bsave (for|that)\b": "except",
    r"\bsome \d": "about",
    r"\braises? \w+ where\b": "raises ... if",
    r"\b(none|null|0) where (it|there|that|its|no)\b": "None if",
    r"\b(once|twice|times|ms|us|seconds|microseconds|tokens|blocks|bytes|keys|tiles|programs|rows|nats) an? "
    r"(step|query|token|second|layer|row|request|block|segment|head|tile|program|launch|sequence|thread)\b"
    r"(?! (block )?(sees|reads|can|has|needs|holds))": "per",
    r"\d %(?! \w+\))": "%, without a space",
}
TEXT = (".md", ".html", ".j2", ".yaml", ".yml", ".toml", ".sh", "Makefile", "Dockerfile", "Dockerfile.cpu")


def files() -> list[str]:
    """The text and Python files of the repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = [
        name for name in listed.splitlines() if name.endswith((*TEXT, ".py")) and (ROOT / name).is_file()
    ]
    return [name for name in found if name != "tests/test_language.py"]


def prose(name: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of a file; only comments and strings of Python code."""
    if not name.endswith(".py"):
        yield from enumerate((ROOT / name).read_text().splitlines(), 1)
        return
    with tokenize.open(ROOT / name) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.COMMENT or "STRING" in tokenize.tok_name[token.type]:
                yield from enumerate(token.string.splitlines(), token.start[0])


def slips(name: str) -> list[str]:
    """Every slip in a file, with its line number and what to write instead."""
    return [
        f"{name}:{number}: {match[0]!r}: write {better}"
        for number, text in prose(name)
        for slip, better in SLIPS.items()
        for match in re.finditer(slip, text, flags=re.I)
    ]


@pytest.mark.parametrize("name", files())
def test_language(name):
    assert not (found := slips(name)), "\n".join(found)
