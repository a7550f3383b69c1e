"""What the sweep found: one JSON object per architecture in docs/results/models.jsonl."""

import json
from pathlib import Path
from typing import Any

EXACT, REFUSED, NOT_BUILT, WRONG = "exact", "refused", "cannot be built here", "wrong"
RESULTS = Path(__file__).parents[2] / "docs/results/models.jsonl"


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The results by architecture."""
    if not file.exists():
        return {}
    return {result["architecture"]: result for result in map(json.loads, file.read_text().splitlines())}


def write(file: Path, results: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(result) + "\n" for result in results))
