"""Finished items in a file, one JSON object per line: a run that ended early resumes there."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_power.tools.common import jsonl
from vllm_power.tools.evals.endpoint import Model
from vllm_power.tools.evals.items import Item, Result
from vllm_power.tools.evals.settings import EvalError


class Store:
    """The results in ``folder``/items.jsonl, and in models.json what the targets served.

    One process at a time may write there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "items.jsonl"
        self.models_path = folder / "models.json"
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self._drop_torn_line(self.path.read_bytes())
            try:
                rows = jsonl.read(self.path, "digest", "result")
            except ValueError as error:
                raise EvalError(f"{error}, and its question is asked again") from None
            self.rows = {row["digest"]: row for row in rows}

    def _drop_torn_line(self, data: bytes) -> None:
        """A run that was killed while it wrote leaves half a line at the end: that item is asked again."""
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            self.path.write_bytes(whole)

    def __contains__(self, item: Item) -> bool:
        return item.digest in self.rows

    def result(self, item: Item) -> Result | None:
        """The item's result, None if it is not finished."""
        row = self.rows.get(item.digest)
        return row["result"] if row else None

    def append(self, item: Item, result: Result) -> None:
        """Keep a finished item."""
        row = {"digest": item.digest, "key": item.key, "result": result}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows[item.digest] = row

    def model(self, target: str) -> Model | None:
        """What a target served when it was asked before, None if it was not."""
        known = self._models().get(target)
        return Model(**known) if known else None

    def keep_model(self, target: str, model: Model) -> None:
        """Keep what a target serves."""
        self.models_path.write_text(json.dumps(self._models() | {target: asdict(model)}, indent=1) + "\n")

    def _models(self) -> dict[str, dict[str, Any]]:
        if not self.models_path.exists():
            return {}
        try:
            known: dict[str, dict[str, Any]] = json.loads(self.models_path.read_text())
            return {target: asdict(Model(**model)) for target, model in known.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise EvalError(f"{self.models_path} is damaged ({error}); remove it") from None
