"""How the small model learns to relay a passkey under a pattern, with the engine and the loop of `adapt`.

What makes it fast:
- every token between passkey and question is asked for the passkey by a probe that is discarded later, so relaying is
  learnt from all of them and not from the few answers alone;
- documents grow, and with them the number of hops; until the last stage blocks are smaller, so that as many hops fit
  into fewer tokens;
- the matrices inside the layers learn by Muon, the rest by AdamW;
- one compiled layer serves all lengths, block sizes and patterns: only the lists of the plan differ.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from vllm_power.hf.attention import use_power
from vllm_power.hf.sparse import Plan
from vllm_power.tools.adapt.callbacks import Bar
from vllm_power.tools.adapt.engine import Planner, compile_layers, hidden_states, prepare
from vllm_power.tools.adapt.loop import fill_memory, run_to_the_end, training_arguments
from vllm_power.tools.common import passkey_data as data
from vllm_power.tools.passkey.documents import Collator, Documents
from vllm_power.tools.passkey.model import new_model
from vllm_power.tools.passkey.optimizer import MuonAndAdamW
from vllm_power.tools.passkey.settings import Settings

LOG = "log.jsonl"
STEPS_BETWEEN_REPORTS = 20
SECONDS_BETWEEN_CHECKPOINTS = 60.0


class Student(nn.Module):
    """The model, and the probe that is discarded after the training. Returns the loss and what is reported of it.

    dtype: what is computed in; the weights are float32.
    """

    def __init__(self, settings: Settings, dtype: torch.dtype) -> None:
        super().__init__()
        self.settings = settings
        self.dtype = dtype
        self.model = new_model(settings)
        self.probe = nn.Linear(settings.width, 10 * data.NUM_DIGITS)
        for weight in self.probe.parameters():
            nn.init.zeros_(weight)
        self._under: int | None = None
        self._run_under(settings.block_size)
        prepare(self.model, settings.options(settings.block_size), dtype)

    def forward(
        self,
        block_size: int,
        position_ids: torch.Tensor | None = None,
        power_plan: Plan | None = None,
        **batch: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """batch: the tensors of a data.Batch, with whole rows of documents.

        position_ids [rows, row] and power_plan: of the rows. Without a plan, each document is a row.

        Returns loss; numbers: float [4], answer loss, probe loss, digits right, probe right; passkeys: how many
        documents had the whole passkey right. They are means over documents or rows of equal size, so they do not
        depend on the micro-batches.
        """
        documents = data.Batch(**batch)
        if power_plan is None:
            self._run_under(block_size)
            states = hidden_states(self.model, input_ids=documents.tokens)
        else:
            assert position_ids is not None
            tokens = documents.tokens.view(position_ids.shape)
            states = hidden_states(self.model, power_plan, input_ids=tokens, position_ids=position_ids)
        with torch.autocast(states.device.type, enabled=False):
            return self._loss(states.to(self.dtype).view(*documents.tokens.shape, -1), documents)

    def gradient_checkpointing_enable(self, **named: Any) -> None:
        """As of the model."""
        self.model.gradient_checkpointing_enable(**named)

    def gradient_checkpointing_disable(self) -> None:
        """As of the model."""
        self.model.gradient_checkpointing_disable()

    def _loss(self, hidden: torch.Tensor, batch: data.Batch) -> dict[str, torch.Tensor]:
        """hidden: [documents, length, width]."""
        positions = batch.answer_positions()
        at_answers = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        logits, answers = self.model.lm_head(at_answers.float()), batch.answers()
        answer_loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())

        guesses = F.linear(hidden, self.probe.weight.to(hidden.dtype), self.probe.bias.to(hidden.dtype))
        guesses = guesses.float().unflatten(-1, (data.NUM_DIGITS, 10))
        wanted = batch.digits[:, None, :, None].expand(-1, guesses.shape[1], -1, -1)
        between = batch.between().view(-1, self.settings.row).float()
        share = (between / between.sum(1, keepdim=True) / len(between)).view(batch.tokens.shape)
        told = guesses.log_softmax(-1).gather(-1, wanted)[..., 0].mean(-1)
        probe_loss = -(told * share).sum()
        probe_right = ((guesses.argmax(-1) == wanted[..., 0]).float().mean(-1) * share).sum()

        right = (logits.argmax(-1) == answers)[:, data.digit_columns()]
        numbers = torch.stack((answer_loss, probe_loss, right.float().mean(), probe_right)).detach()
        loss = answer_loss + self.settings.probe * probe_loss
        return {"loss": loss, "numbers": numbers, "passkeys": right.all(-1).sum()}

    def _run_under(self, block_size: int) -> None:
        if block_size != self._under:
            use_power(self.model, self.settings.options(block_size))
            self._under = block_size


class PasskeyTrainer(Trainer):
    """The Trainer, which also logs the numbers of :class:`Student`."""

    def __init__(self, settings: Settings, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.settings = settings
        self.tally = Tally()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """One micro-batch."""
        output = model(**inputs)
        self.tally.add(inputs["tokens"], output["numbers"], output["passkeys"])
        return output["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the numbers since the last report."""
        if "loss" in logs:
            logs = logs | self.tally.report()
            self.tally = Tally()
        super().log(logs, start_time)


@dataclass
class Tally:
    """Sums over the micro-batches since the last report. They stay on the device: reading them would wait for it."""

    batches: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    sums: torch.Tensor | None = None
    right: dict[int, torch.Tensor] = field(default_factory=dict)
    documents: dict[int, int] = field(default_factory=dict)

    def add(self, tokens: torch.Tensor, numbers: torch.Tensor, passkeys: torch.Tensor) -> None:
        """tokens: [documents, length]; numbers, passkeys: as of :class:`Student`."""
        documents, length = tokens.shape
        self.batches += 1
        self.tokens += tokens.numel()
        self.sums = numbers if self.sums is None else self.sums + numbers
        self.right[length] = self.right.get(length, 0) + passkeys
        self.documents[length] = self.documents.get(length, 0) + documents

    def report(self) -> dict[str, Any]:
        """Means, and the share of right passkeys at each length. Waits for the device."""
        assert self.sums is not None
        answer_loss, probe_loss, digits, probe = (self.sums / self.batches).tolist()
        return {
            "answer_loss": answer_loss,
            "probe_loss": probe_loss,
            "digits": digits,
            "probe": probe,
            "passkeys": {
                str(length): right.item() / self.documents[length]
                for length, right in sorted(self.right.items())
            },
            "tokens_per_second": self.tokens / (time.monotonic() - self.started),
        }


class Saving(TrainerCallback):
    """Asks for a checkpoint once a minute."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if time.monotonic() - self.last > SECONDS_BETWEEN_CHECKPOINTS:
            control.should_save = True
            self.last = time.monotonic()


class Logging(TrainerCallback):
    """Writes what was logged so far, one line per report."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        entries = [entry for entry in state.log_history if "loss" in entry]
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def train(settings: Settings, folder: Path, console: Console) -> LlamaForCausalLM:
    """Train to the end, from the last checkpoint in ``folder`` if there is one. Returns the model.

    Writes checkpoints and log.jsonl there. Raises Stopped after SIGTERM or Ctrl-C, and ValueError if the folder has a
    training with other settings.
    """
    settings.check(folder)
    settings.write(folder)
    cuda = torch.cuda.is_available()
    arguments = training_arguments(
        folder / "checkpoints",
        max_steps=settings.steps,
        per_device_train_batch_size=settings.rows_in_step,
        bf16=cuda,
        logging_steps=STEPS_BETWEEN_REPORTS,
        save_strategy="no",  # Saving asks for them
        save_total_limit=1,
        seed=settings.seed,
    )
    student = Student(settings, torch.bfloat16 if cuda else torch.float32)
    planners = None
    if Planner.suits(student.model.config, arguments.device):
        planners = Planners(settings, student.model.config, student.dtype)
    collate = Collator(settings.row, planners)
    rows = Documents(settings)
    if planners is not None:
        student.to(arguments.device)
        compile_layers(student.model)

        def loss_of(count: int) -> torch.Tensor:
            batch = collate([rows[0]] * count)
            moved = {
                name: part if name == "block_size" else part.to(arguments.device)
                for name, part in batch.items()
            }
            return student(**moved)["loss"]

        fill_memory(arguments, student, settings.row, loss_of, console)
    optimizer = MuonAndAdamW(student, student.model.model.layers, settings, fused=cuda)
    trainer = PasskeyTrainer(
        settings,
        student,
        arguments,
        train_dataset=rows,
        data_collator=collate,
        optimizers=(optimizer, LambdaLR(optimizer, settings.rate)),
        callbacks=[Saving(), Logging(folder / LOG)],
    )
    bar = Bar(settings.steps, settings.tokens, describe, console)
    run_to_the_end(trainer, bar, console, lambda: None)
    return student.model


def describe(step: int, logs: dict[str, Any]) -> str:
    """What the progress shows."""
    lengths = " ".join(f"{length}:{share:.0%}" for length, share in logs["passkeys"].items())
    return (
        f"loss {logs['answer_loss']:.3f}, probe {logs['probe']:.0%}, digits {logs['digits']:.0%}, passkeys {lengths}, "
        f"{logs['tokens_per_second'] / 1e3:,.0f}K tokens/s"
    )


class Planners:
    """The planner for each size of blocks. Not closures: a loader's processes receive a copy."""

    def __init__(self, settings: Settings, config: Any, dtype: torch.dtype) -> None:
        self.planners = {
            size: Planner(config, settings.options(size), dtype)
            for size in {settings.block_size // stage.shrink for stage in settings.curriculum}
        }

    def __call__(self, block_size: int) -> Planner:
        return self.planners[block_size]
