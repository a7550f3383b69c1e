"""Files with a JSON object per line, in which a process that was killed may have left damage."""

import json
from pathlib import Path
from typing import Any


def read(path: Path, *keys: str) -> list[dict[str, Any]]:
    """Return the objects of a file; each has the ``keys``. Raises ValueError that names a damaged line."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or any(key not in row for key in keys):
                raise ValueError(f"no object with {', '.join(keys)}" if keys else "no object")
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError too
            raise ValueError(f"{path}: line {number} is damaged ({error}); remove that line") from None
        found.append(row)
    return found
