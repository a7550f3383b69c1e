"""Options of commands that hold JSON."""

import json
from typing import Any


def json_object(text: str, source: str) -> dict[str, Any]:
    """The object that an option of a command holds as JSON; ``source`` names it in errors. Raises ValueError."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f'{source} must be a JSON object such as {{"block_size": 64}}, not {text}')
    return found
