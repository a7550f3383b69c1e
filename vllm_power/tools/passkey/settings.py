"""Everything that determines a passkey training: the curriculum, the model's sizes, the optimizers' rates."""

import json
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_power.options import PatternOptions

FILE = "passkey.json"


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum, up to the share ``until`` of the training.

    blocks: lengths of documents in blocks, one drawn for each step; shrink: blocks are smaller by this factor.
    """

    until: float
    blocks: tuple[int, ...]
    shrink: int = 1


CURRICULUM = (
    Stage(0.06, (2, 4), shrink=2),
    Stage(0.14, (8, 16), shrink=2),
    Stage(0.24, (32,), shrink=2),
    Stage(0.36, (64, 128), shrink=2),
    Stage(1.00, (4, 16, 32, 64, 128, 128, 128)),
)


@dataclass(frozen=True)
class Settings:
    """tokens: per step.

    muon_lr, weight_decay: for the matrices of the layers, which Muon moves as far at a loss near 0 as before; without
    decay they would wander off. lr: AdamW's, for everything else. decay: over this last share of the training the rates
    fall to a fiftieth. probe: the weight of the probe's loss.
    """

    pattern: str = "power"
    block_size: int = 256
    curriculum: tuple[Stage, ...] = CURRICULUM
    steps: int = 2_000
    tokens: int = 131_072
    width: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 512
    rope_theta: float = 1e7
    lr: float = 3e-3
    muon_lr: float = 0.02
    weight_decay: float = 0.1
    warmup_steps: int = 50
    decay: float = 0.4
    probe: float = 1.0
    seed: int = 0

    @property
    def row(self) -> int:
        """Tokens per row, the unit of micro-batches: one of the longest documents, or several shorter ones."""
        return max(max(stage.blocks) * (self.block_size // stage.shrink) for stage in self.curriculum)

    @property
    def rows_in_step(self) -> int:
        """Rows per step."""
        return self.tokens // self.row

    def documents_of(self, step: int) -> tuple[int, int]:
        """(tokens per document, tokens per block) of the step with this index."""
        stage = next(
            stage for stage in self.curriculum if step / self.steps < stage.until or stage.until >= 1
        )
        block_size = self.block_size // stage.shrink
        return random.Random(f"{self.seed} {step}").choice(stage.blocks) * block_size, block_size

    def options(self, block_size: int) -> PatternOptions:
        """The pattern with blocks of ``block_size`` tokens. Raises ValueError for an unknown pattern."""
        return PatternOptions.model_validate({"pattern": self.pattern, "block_size": block_size})

    def rate(self, step: int) -> float:
        """The learning rates' factor: a warm-up, then 1, then down to a fiftieth over the last part."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return warm * min(1.0, max(0.02, (1 - step / self.steps) / self.decay))

    # --- the file in a training's folder ------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """Mark ``folder`` as this training's."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(self._plain(), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Settings":
        """The settings of the training in ``folder``. Raises OSError if there is none."""
        stored = json.loads((folder / FILE).read_text())
        curriculum = tuple(
            Stage(stage["until"], tuple(stage["blocks"]), stage["shrink"]) for stage in stored["curriculum"]
        )
        return cls(**{**stored, "curriculum": curriculum})

    def check(self, folder: Path) -> None:
        """Raises ValueError if ``folder`` has a training with other settings."""
        if not (folder / FILE).exists():
            return
        ours, theirs = self._plain(), json.loads((folder / FILE).read_text())
        different = ", ".join(
            "another curriculum" if key == "curriculum" else f"{key} {theirs.get(key)} there, {value} here"
            for key, value in ours.items()
            if theirs.get(key) != value
        )
        if different:
            raise ValueError(
                f"{folder} has a training with other settings ({different}): use another folder, or those options"
            )

    def _plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


GPU = Settings()

# What two CPU cores train in an hour: 0.31 million weights. A step of whole prompts takes seconds there, so relaying is
# learnt in blocks of 16 tokens, and only then do the blocks grow.
CPU = Settings(
    curriculum=(
        Stage(0.04, (4,), shrink=16),
        Stage(0.09, (8, 16), shrink=16),
        Stage(0.14, (32,), shrink=16),
        Stage(0.28, (64, 128), shrink=16),
        Stage(0.36, (64, 128), shrink=8),
        Stage(0.44, (64, 128), shrink=4),
        Stage(0.54, (128,), shrink=2),
        Stage(1.00, (16, 64, 128, 128)),
    ),
    steps=1_278,
    tokens=32_768,
    width=64,
    heads=2,
    kv_heads=1,
    ffn=128,
)

# For tests: blocks of 32 tokens (16 at first), contexts an eighth as long as the others.
TOY = replace(
    CPU,
    block_size=32,
    curriculum=(Stage(0.7, (4,), shrink=2), Stage(1.0, (8,), shrink=2)),
    steps=300,
    tokens=2_048,
    decay=0.25,
    layers=3,
)

SIZES = {"gpu": GPU, "cpu": CPU, "toy": TOY}
