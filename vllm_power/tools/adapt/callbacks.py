"""What happens between steps: a progress bar, a stop on signals, an error if the loss is no longer sound."""

import math
import signal
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from vllm_power.tools.adapt.settings import Settings

REMEMBERED = 20  # steps whose median loss is what a spike is measured against
LASTING = 5  # steps in a row: what lasts less comes from the data, and leaves the weights as they were
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Sound(TrainerCallback):
    """Raises FloatingPointError if a loss is not a number, or stays far above those before it.

    That is before a checkpoint of the step could be written. While it is above, no checkpoint is written either.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.before: deque[float] = deque(maxlen=REMEMBERED)
        self.above = 0  # steps in a row

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.before.extend(entry["loss"] for entry in state.log_history[-REMEMBERED:] if "loss" in entry)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **named: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm") or 0.0)
        step, length = state.global_step, self.settings.length_at(state.global_step - 1)
        where = f"at step {step} (sequences of {length:,} tokens, learning rate {logs.get('learning_rate', 0):.2g})"
        remedy = (
            "Train again, to another --output, with a lower --learning-rate, a longer --warmup or other data."
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"loss {loss}, gradient norm {norm} {where}. {remedy}")
        usual = median(self.before) if len(self.before) == REMEMBERED else math.inf
        if loss <= self.settings.spike * usual:
            self.above = 0
            self.before.append(loss)
            return
        self.above += 1
        control.should_save = False
        if self.above == LASTING:
            raise FloatingPointError(
                f"the loss is {loss:.3f} {where}, far above for {LASTING} steps in a row; of {REMEMBERED} steps before "
                f"the median was {usual:.3f}. {remedy} If it may rise, raise --spike."
            )


class Stop(TrainerCallback):
    """SIGTERM and Ctrl-C end the training after the step in progress, with a checkpoint."""

    def __init__(self) -> None:
        self.asked = False
        self.stopped = False
        self._handlers: dict[signal.Signals, Any] = {}

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if self._any_asked(args.device):
            self.stopped = control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """The signals' former meaning; after the training, however it ended."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _any_asked(self, device: torch.device) -> bool:
        """Whether any process was asked: all have to stop at the same step."""
        if PartialState().num_processes == 1:
            return self.asked
        asked = torch.tensor(int(self.asked), device=device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return bool(asked)


class Bar(TrainerCallback):
    """A progress bar in a terminal, and elsewhere about twenty lines.

    steps, batch_tokens: of the training. describe: what is shown of a step, given its number and what was logged.
    """

    def __init__(
        self,
        steps: int,
        batch_tokens: int,
        describe: Callable[[int, dict[str, Any]], str],
        console: Console,
    ) -> None:
        self.steps, self.batch_tokens = steps, batch_tokens
        self.describe = describe
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self.console = console
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("starting", total=steps)
        self.logged: list[tuple[int, float]] = []  # steps, and when they were logged
        self.shown = 0  # twentieths

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)
        self.progress.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **named: Any) -> None:
        if not logs or "loss" not in logs:
            return
        step = state.global_step
        self.logged.append((step, time.monotonic()))
        text = self.describe(step, logs)
        self.progress.update(self.task, completed=step, description=text)
        if not self.console.is_terminal and (twentieth := 20 * step // self.steps) > self.shown:
            self.shown = twentieth
            self.console.print(f"step {step} of {self.steps}, {text}", highlight=False, soft_wrap=True)

    @property
    def tokens_per_second(self) -> float | None:
        """The median of all processes together, without the first step, which compiles. None before two logs."""
        pairs = pairwise(self.logged)
        times = [(after - before) / (step - last) for (last, before), (step, after) in pairs]
        return self.batch_tokens / median(times) if times else None
