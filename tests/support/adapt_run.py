"""The numbers of the small runs in tests/adapt, and what they leave."""

import json
from pathlib import Path
from typing import Any

POWER = {"block_size": 16, "window_blocks": 2}  # dense up to 64 tokens
TOKENS = 512  # per step: 4 rows


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
