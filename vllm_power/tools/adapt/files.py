"""Text files, looked at before `datasets` reads them, and its errors in one sentence."""

import glob
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSED = (".gz", ".xz", ".zst")
OPENED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
# Text compresses to a third, at best to a twentieth of its size. What expands further fills the memory.
MOST_EXPANSION, LOOKED_AT = 100, 64 << 20


def load(path: str, cache: Path) -> tuple[str, Any]:
    """Return the kind of a file, "text", "json" or "parquet", and its rows, read by `datasets`.

    Raises ValueError for a file that is not there, is of another kind, is damaged, or expands too far.
    """
    from datasets import load_dataset

    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    kind = KINDS.get(Path(uncompressed(path)).suffix)
    if kind is None:
        raise ValueError(f"{path}: text is read from {', '.join(KINDS)}, also with {', '.join(COMPRESSED)}")
    named = {"sample_by": "document"} if kind == "text" else {}
    # `datasets` takes a name for a pattern: [1] would stand for the file with a 1.
    files = [glob.escape(path)]
    try:
        check_expansion(Path(path))
        return kind, load_dataset(kind, data_files=files, split="train", cache_dir=str(cache), **named)
    except ExpandsTooFar:
        raise
    except Exception as error:
        cause = damaged_line(Path(path)) if kind == "json" else None
        raise ValueError(f"{path} cannot be read: {cause or first_line(error.__cause__ or error)}") from error


def uncompressed(path: str) -> str:
    """Return a file's name without the ending that says how it is compressed."""
    return next((path.removesuffix(ending) for ending in COMPRESSED if path.endswith(ending)), path)


class ExpandsTooFar(ValueError):
    """A compressed file is much larger than its size says."""


def check_expansion(path: Path) -> None:
    """Raise ExpandsTooFar if a compressed file's beginning expands further than text does."""
    opened = OPENED.get(path.suffix)
    if opened is None:
        return
    with path.open("rb") as packed, opened(packed) as text:
        size = 0
        while size < LOOKED_AT and (piece := text.read(1 << 20)):
            size += len(piece)
        if size >= LOOKED_AT and size > MOST_EXPANSION * packed.tell():
            raise ExpandsTooFar(
                f"{path} expands to more than {MOST_EXPANSION} times its size, which is no text: give the text without "
                "compression if it is meant"
            )


def damaged_line(path: Path) -> str | None:
    """Return which line of a file of JSON lines is damaged and how; None if no line is, or it cannot be told."""
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    json.loads(line)
                except ValueError as error:
                    return f"line {number} is no JSON ({first_line(error)})"
    except (OSError, EOFError, lzma.LZMAError):
        return None
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _open(path: Path) -> BinaryIO:
    opened: BinaryIO = OPENED.get(path.suffix, open)(path, "rb")
    return opened
