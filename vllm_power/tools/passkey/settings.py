"""All that decides the outcome of a passkey training: the curriculum, the model's sizes, the optimisers' rates."""

from dataclasses import dataclass, replace

from vllm_power.tools.common.passkey_data import WORDS
from vllm_power.tools.passkey.small_model import Sizes


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
    """tokens: of one step; minutes and steps: whichever ends first ends the training.

    muon_lr, weight_decay: for the matrices of the layers, which Muon moves as far at a loss near 0 as before; without
    decay they would wander off. lr: AdamW's, for everything else. decay: over this last share of the training the rates
    fall to a fiftieth. probe: the weight of the probe's loss.
    """

    pattern: str = "power"
    block_size: int = 256
    curriculum: tuple[Stage, ...] = CURRICULUM
    minutes: float = 15.0
    steps: int = 100_000
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
    def sizes(self) -> Sizes:
        """The model's."""
        return Sizes(
            len(WORDS), self.width, self.layers, self.heads, self.kv_heads, self.ffn, self.rope_theta
        )


GPU = Settings(steps=2_000)

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
    minutes=55.0,
    tokens=32_768,
    width=64,
    heads=2,
    kv_heads=1,
    ffn=128,
)

# For tests: blocks of 32 tokens (16 while it learns), contexts an eighth as long as the others.
TOY = replace(
    CPU,
    block_size=32,
    curriculum=(Stage(0.7, (4,), shrink=2), Stage(1.0, (8,), shrink=2)),
    minutes=GPU.minutes,
    steps=300,
    tokens=2_048,
    decay=0.25,
    layers=3,
)

SIZES = {"gpu": GPU, "cpu": CPU, "toy": TOY}
