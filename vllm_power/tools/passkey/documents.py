"""The rows of a training: passkey documents of one length side by side, with the plan of their attention."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from vllm_power.tools.adapt.engine import Planner
from vllm_power.tools.common import passkey_data as data
from vllm_power.tools.passkey.settings import Settings

TENSORS = ("tokens", "digits", "needle", "question")  # of a data.Batch


class Documents(Dataset[dict[str, Any]]):
    """All rows of a training, in order. A row depends on its index and the settings only."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __len__(self) -> int:
        return self.settings.steps * self.settings.rows_in_step

    def __getitem__(self, index: int) -> dict[str, Any]:
        settings = self.settings
        length, block_size = settings.documents_of(index // settings.rows_in_step)
        seed = random.Random(f"{settings.seed} row {index}").getrandbits(63)
        generator = torch.Generator().manual_seed(seed)
        batch = data.sample(settings.row // length, length, generator, slack=block_size)
        return {name: getattr(batch, name) for name in TENSORS} | {"block_size": block_size}


class Collator:
    """Rows of one step together, with their plan if there are planners.

    planner_of: the Planner for a number of tokens per block; None: each document is a row, and nothing is planned.
    """

    def __init__(self, row: int, planner_of: Callable[[int], Planner] | None) -> None:
        self.row = row
        self.planner_of = planner_of

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {name: torch.cat([row[name] for row in rows]) for name in TENSORS}
        batch["block_size"] = rows[0]["block_size"]
        if self.planner_of is not None:
            batch |= planned(self.planner_of(batch["block_size"]), batch["tokens"].shape, self.row)
        return batch


def planned(planner: Planner, shape: tuple[int, int], row: int) -> dict[str, Any]:
    """position_ids and power_plan, on the CPU, of documents side by side in rows of ``row`` tokens.

    shape: documents, which fill whole rows, and tokens per document.
    """
    documents, length = shape
    positions = torch.arange(length).repeat(documents).view(-1, row)
    return {"position_ids": positions, "power_plan": planner(positions)}
