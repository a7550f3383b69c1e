"""How the small model learns to relay a passkey under a pattern: a step and checkpoints. passkey_run.py runs it.

What makes it quick:
- every token between passkey and question is asked for the passkey by a probe that is thrown away later, so relaying it
  is learnt from all of them and not from the few answers alone;
- documents grow, and with them the number of hops; until the last stage blocks are smaller, so that as many hops fit
  into fewer tokens;
- the matrices inside the layers learn by Muon, the rest by AdamW;
- one compiled layer serves all lengths (packing.py).
"""

import json
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_power.pattern import preset
from vllm_power.tools.common import passkey_data as data
from vllm_power.tools.passkey.packing import LARGEST_TILE, Packing, pack
from vllm_power.tools.passkey.settings import Settings, Stage
from vllm_power.tools.passkey.small_model import SmallModel


@dataclass
class Tally:
    """Sums over the steps since the last report, kept on the device: reading them each step would make it wait."""

    steps: int = 0
    started: float = field(default_factory=time.monotonic)
    sums: torch.Tensor | None = None
    by_length: dict[int, torch.Tensor] = field(default_factory=dict)
    documents: dict[int, int] = field(default_factory=dict)

    def add(self, packing: Packing, numbers: torch.Tensor, keys_right: torch.Tensor) -> None:
        """numbers: float [4] of one step; keys_right: how many documents had the whole passkey right."""
        self.steps += 1
        self.sums = numbers if self.sums is None else self.sums + numbers
        self.by_length[packing.length] = self.by_length.get(packing.length, 0) + keys_right
        self.documents[packing.length] = self.documents.get(packing.length, 0) + packing.documents

    def report(self, tokens: int) -> dict[str, Any]:
        """Means, and the share of right passkeys at each length. Waits for the device."""
        assert self.sums is not None
        answer_loss, probe_loss, digits, probe = (self.sums / self.steps).tolist()
        return {
            "answer_loss": answer_loss,
            "probe_loss": probe_loss,
            "digits": digits,
            "probe": probe,
            "passkeys": {
                length: right.item() / self.documents[length]
                for length, right in sorted(self.by_length.items())
            },
            "tokens_per_second": self.steps * tokens / (time.monotonic() - self.started),
        }


class Trainer:
    """The state of one training, its step, and its checkpoint."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = SmallModel(settings.sizes, torch.Generator().manual_seed(settings.seed)).to(device)
        self.probe = nn.Linear(settings.width, 10 * data.NUM_DIGITS, device=device)
        for weight in self.probe.parameters():
            nn.init.zeros_(weight)
        self.generator = torch.Generator(device).manual_seed(settings.seed)
        self.step = 0
        self.elapsed = 0.0
        self.parameters = [*self.model.parameters(), *self.probe.parameters()]
        matrices = [weight for weight in self.model.model.layers.parameters() if weight.dim() == 2]
        inside = {id(weight) for weight in matrices}
        rest = [weight for weight in self.parameters if id(weight) not in inside]
        self.optimizers = {
            "muon": torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay),
            "adamw": torch.optim.AdamW(
                rest, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"
            ),
        }
        self.packings: dict[tuple[int, int], Packing] = {}
        if device.type == "cuda":
            for layer in self.model.model.layers:
                layer.compile(fullgraph=True)

    # --- one step -----------------------------------------------------------------------------------------------

    def train_step(self, progress: float, tally: Tally) -> None:
        """One step of both optimisers; ``progress`` is the share of the training that is done."""
        rate = self._rate(progress)
        for name, optimizer in self.optimizers.items():
            base = self.settings.muon_lr if name == "muon" else self.settings.lr
            optimizer.param_groups[0]["lr"] = base * rate
            optimizer.zero_grad()
        stage = next(
            stage for stage in self.settings.curriculum if progress < stage.until or stage.until >= 1
        )
        blocks = random.Random(f"{self.settings.seed} {self.step}").choice(stage.blocks)
        packing = self.packing(blocks, self.settings.block_size // stage.shrink)
        batch = data.sample(
            packing.documents,
            packing.length,
            self.generator,
            slack=self.settings.block_size // stage.shrink,
        )
        loss, numbers, keys_right = self._loss(self.hidden(packing, batch.tokens), batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.step += 1
        tally.add(packing, numbers, keys_right)

    def packing(self, blocks: int, block_size: int) -> Packing:
        """As many documents of ``blocks`` blocks as make up a step."""
        if (blocks, block_size) not in self.packings:
            pattern = preset(self.settings.pattern, block_size=block_size)
            length = blocks * block_size
            documents = self.settings.tokens // length
            self.packings[blocks, block_size] = pack(
                pattern, documents, length, self.settings.sizes, self.device
            )
        return self.packings[blocks, block_size]

    def hidden(self, packing: Packing, tokens: torch.Tensor) -> torch.Tensor:
        """The last hidden states [documents, length, width], in bfloat16 on a GPU; tokens: [documents, length]."""
        states = self.model.model(tokens.view(packing.rows, -1), packing.rotation, packing.mask, self.dtype)
        return states.view(packing.documents, packing.length, -1)

    def _loss(
        self, hidden: torch.Tensor, batch: data.Batch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss, (answer loss, probe loss, digits right, probe right) and the number of passkeys that are right."""
        positions = batch.answer_positions()
        at_answers = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        logits, answers = self.model.lm_head(at_answers.float()), batch.answers()
        answer_loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())

        between = batch.between()
        guesses = F.linear(hidden, self.probe.weight.to(hidden.dtype), self.probe.bias.to(hidden.dtype))
        guesses = guesses.float().unflatten(-1, (data.NUM_DIGITS, 10))
        told = guesses.log_softmax(-1)
        wanted = batch.digits[:, None, :, None].expand(-1, told.shape[1], -1, -1)
        share = between.float() / between.sum()
        probe_loss = -(told.gather(-1, wanted)[..., 0].mean(-1) * share).sum()
        probe_right = ((guesses.argmax(-1) == wanted[..., 0]).float().mean(-1) * share).sum()

        right = (logits.argmax(-1) == answers)[:, digit_columns()]
        numbers = torch.stack((answer_loss, probe_loss, right.float().mean(), probe_right)).detach()
        return answer_loss + self.settings.probe * probe_loss, numbers, right.all(-1).sum()

    def _rate(self, progress: float) -> float:
        """The learning rate's factor: a warm-up, then 1, then down to a fiftieth over the last part."""
        warm = min(1.0, (self.step + 1) / self.settings.warmup_steps)
        return warm * min(1.0, max(0.02, (1 - progress) / self.settings.decay))

    # --- checkpoints --------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write everything needed to go on; the file is whole or the old one."""
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "probe": self.probe.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "generator": self.generator.get_state(),
            "step": self.step,
            "elapsed": self.elapsed,
        }
        unfinished = path.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(path)

    @classmethod
    def of_checkpoint(cls, path: Path, device: torch.device) -> "Trainer":
        """The settings, weights and step of the training that wrote ``path``, to evaluate.

        On ``device``, unless the blocks are smaller than a GPU's tiles: then on the CPU.
        """
        state = torch.load(path, map_location="cpu", weights_only=True)
        stored = state["settings"]
        curriculum = tuple(
            Stage(stage["until"], tuple(stage["blocks"]), stage["shrink"]) for stage in stored["curriculum"]
        )
        settings = Settings(**{**stored, "curriculum": curriculum})
        trainer = cls(settings, torch.device("cpu") if settings.block_size % LARGEST_TILE else device)
        trainer.model.load_state_dict(state["model"])
        trainer.step = state["step"]
        return trainer

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. Raises ValueError where it was made with other settings."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        ours = json.loads(json.dumps(asdict(self.settings)))
        theirs = json.loads(json.dumps(state["settings"]))
        if ours != theirs:
            different = ", ".join(
                "another curriculum"
                if key == "curriculum"
                else f"{key} {theirs.get(key)} there, {value} here"
                for key, value in ours.items()
                if theirs.get(key) != value
            )
            raise ValueError(
                f"{path} is of other settings ({different}): use another folder, or those options"
            )
        self.model.load_state_dict(state["model"])
        self.probe.load_state_dict(state["probe"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.generator.set_state(state["generator"])
        self.step, self.elapsed = state["step"], state["elapsed"]


def digit_columns() -> slice:
    """Where the digits are among an answer's tokens."""
    return slice(data.DIGITS_IN_ANSWER, data.DIGITS_IN_ANSWER + data.NUM_DIGITS)
