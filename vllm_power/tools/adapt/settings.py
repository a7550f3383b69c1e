"""What determines the outcome of a run. It is stored with the run, so that only the same run uses its checkpoints."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FILE = "adapt.json"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum. length: tokens of a sequence; amount: of tokens, or of steps."""

    length: int
    amount: int
    in_steps: bool = False

    def steps(self, batch_tokens: int) -> int:
        """Steps of ``batch_tokens`` tokens each that make up the stage."""
        return self.amount if self.in_steps else max(1, -(-self.amount // batch_tokens))


def stages_of(text: str) -> tuple[Stage, ...]:
    """The stages that ``text`` names: "4K:250M,32K:250M" in tokens, "4K:200steps" in steps.

    In lengths K is 1,024 tokens; in amounts K, M and B are powers of ten. Raises ValueError for anything else, and
    where a length does not divide the longest: rows of the longest are filled with sequences of the others.
    """
    stages = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(K?):(\d+(?:\.\d+)?)(K|M|B|steps|)\s*", part)
        if not found:
            raise ValueError(
                f'stages: {part!r} is not LENGTH:TOKENS, like "4K:250M", or LENGTH:STEPS, like "4K:200steps"'
            )
        length = int(found[1]) * (1024 if found[2] else 1)
        in_steps = found[4] == "steps"
        amount = int(float(found[3]) * (1 if in_steps else UNITS[found[4]]))
        if length < 2 or amount < 1:
            raise ValueError(f"stages: {part!r} trains nothing: give a length of 2 or more, and an amount")
        stages.append(Stage(length, amount, in_steps))
    longest = max(stage.length for stage in stages)
    for stage in stages:
        if longest % stage.length:
            raise ValueError(
                f"stages: the longest length, {longest:,}, is not a multiple of {stage.length:,}: shorter sequences "
                "are trained side by side in rows of the longest length"
            )
    return tuple(stages)


@dataclass(frozen=True)
class Settings:
    """All of them as in ``vllm-power adapt --help``. power: the pattern's options, as the server's."""

    model: str
    data: tuple[str, ...]
    power: dict[str, Any]
    stages: tuple[Stage, ...]
    held_out: tuple[str, ...] = ()
    field: str = "text"
    apart: bool = False
    batch_tokens: int = 524_288
    learning_rate: float | None = None
    warmup: float = 0.03
    weight_decay: float = 0.1
    lora: int = 0
    embeddings: bool = False
    precision: str = "bf16"
    eval_tokens: int = 262_144
    spike: float = 2.0
    seed: int = 0
    distill: float = 0.0
    recall: float = 0.0
    probe: float = 0.0

    @property
    def dtype(self) -> "torch.dtype":
        """What is computed in."""
        import torch

        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def row(self) -> int:
        """Tokens of a row, the unit in which processes are fed: one sequence of the last length, or several shorter."""
        return max(stage.length for stage in self.stages)

    @property
    def rows_in_step(self) -> int:
        """Rows of a step, all processes together. Raises ValueError if they are not whole."""
        if self.batch_tokens < 1 or self.batch_tokens % self.row:
            raise ValueError(
                f"a step of {self.batch_tokens:,} tokens is not a whole number of sequences of {self.row:,} tokens: "
                f"give --batch-tokens as a multiple of {self.row:,}"
            )
        return self.batch_tokens // self.row

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps(self.batch_tokens) for stage in self.stages)

    @property
    def rate(self) -> float:
        """The peak learning rate. Adapters stand a larger one."""
        return self.learning_rate or (2e-4 if self.lora else 1e-5)

    def length_at(self, step: int) -> int:
        """Tokens of a sequence in the step of this index; the last stage's past the end."""
        for stage in self.stages:
            if step < (steps := stage.steps(self.batch_tokens)):
                return stage.length
            step -= steps
        return self.stages[-1].length

    def check_folder(self, folder: Path) -> None:
        """Raises ValueError if ``folder`` has another run, or a model of other origin."""
        path = folder / FILE
        if not path.exists():
            if (folder / "config.json").exists():
                raise ValueError(f"{folder} has a model that was not made here: give another --output")
            return
        ours, theirs = self._plain(), json.loads(path.read_text())
        changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if changed:
            told = ", ".join(f"{key} {theirs.get(key)} there, {ours.get(key)} here" for key in changed)
            raise ValueError(
                f"{folder} has a run with other settings ({told}): give those, or another --output"
            )

    def write(self, folder: Path) -> None:
        """Mark ``folder`` as this run's."""
        (folder / FILE).write_text(json.dumps(self._plain(), indent=2) + "\n")

    def _plain(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))
