"""The loop of a training: transformers' Trainer resumes from the last complete checkpoint, and stops on signals.

The Trainer counts steps, saves checkpoints and logs; what a step computes is in engine.py. A step waits for the device
only if it logs.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PrinterCallback, Trainer, TrainingArguments

from vllm_power.tools.adapt.callbacks import Bar, Stop
from vllm_power.tools.adapt.memory import plan_memory
from vllm_power.tools.common.command_options import Stopped


def training_arguments(folder: Path, **named: Any) -> TrainingArguments:
    """The Trainer's arguments for rows in a fixed order, with what each training needs in addition.

    ``named`` are arguments of TrainingArguments. Checkpoints are saved in ``folder``.
    """
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_nan_inf_filter=False,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        # A copy from memory that is not pinned, or a loader that reads while the GPU waits, would cost each step more.
        accelerator_config={"non_blocking": cuda},
        dataloader_num_workers=2 if cuda else 0,
        dataloader_prefetch_factor=8 if cuda else None,
        disable_tqdm=True,
        report_to="none",
        **named,
    )
    if arguments.device.type == "cuda":
        # A process trains on one GPU. With several, the Trainer would use DataParallel, which cannot divide a plan.
        arguments._n_gpu = 1
    return arguments


def fill_memory(
    arguments: TrainingArguments,
    model: torch.nn.Module,
    row: int,
    loss_of: Callable[[int], torch.Tensor],
    console: Console,
) -> None:
    """Set the rows per micro-batch to what fits in memory; the rows per step stay the same.

    row: tokens per row. loss_of: as for :func:`plan_memory`; it runs under the autocast of ``arguments``.
    """
    each = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps

    def loss(count: int) -> torch.Tensor:
        with torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):
            return loss_of(count)

    count, checkpoints = plan_memory(model.train(), each, row, loss, arguments.device)
    arguments.per_device_train_batch_size = count
    arguments.gradient_accumulation_steps = each // count
    arguments.gradient_checkpointing = checkpoints
    console.print(
        f"{count} of {each} rows at once, {'with' if checkpoints else 'without'} gradient checkpointing"
    )


def run_to_the_end(trainer: Trainer, bar: Bar, console: Console, at_end: Callable[[], None]) -> None:
    """Train, from the last complete checkpoint if there is one, and call ``at_end`` however the training ends.

    Raises Stopped after SIGTERM or Ctrl-C.
    """
    stop = Stop()
    trainer.add_callback(stop)
    trainer.add_callback(bar)
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(Path(str(trainer.args.output_dir)))
    if checkpoint is not None:
        console.print(f"resuming from {checkpoint}", soft_wrap=True)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        stop.restore()
        bar.progress.stop()
        if bar.tokens_per_second:
            console.print(f"trained at {bar.tokens_per_second:,.0f} tokens/s", highlight=False)
        at_end()
    if stop.stopped:
        raise Stopped(f"stopped at step {trainer.state.global_step}: the same command continues from there")


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written completely: its state is written last."""
    found = sorted(
        folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), reverse=True
    )
    return next((path for path in found if _is_whole(path / "trainer_state.json")), None)


def _is_whole(state: Path) -> bool:
    with suppress(OSError, ValueError):
        json.loads(state.read_text())
        return True
    return False
