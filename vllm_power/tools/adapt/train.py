"""The training itself: transformers' Trainer, going on from its last whole checkpoint."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from vllm_power.hf.attention import use_power
from vllm_power.options import PatternOptions
from vllm_power.tools.adapt import report
from vllm_power.tools.adapt.callbacks import Bar, Sound, Stop
from vllm_power.tools.adapt.data import Rows
from vllm_power.tools.adapt.loss import spare_logits
from vllm_power.tools.adapt.settings import Settings
from vllm_power.tools.common.command_options import Stopped


def train(
    settings: Settings,
    options: PatternOptions,
    rows: Rows,
    tokenizer: Any,
    arguments: TrainingArguments,
    console: Console,
) -> Trainer:
    """Train to the end and return the trainer; the losses are written however it ends.

    Raises Stopped, and FloatingPointError where the loss is not sound.
    """
    model = load(settings, options)
    stop, bar = Stop(), Bar(settings, console)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=default_data_collator,  # the tokenizer's would add a mask, and texts would see each other
        processing_class=tokenizer,
        callbacks=[Sound(settings), stop, bar],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(Path(arguments.output_dir))
    if checkpoint is not None:
        console.print(f"going on from {checkpoint}", soft_wrap=True)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        stop.restore()
        bar.progress.stop()
        if trainer.is_world_process_zero():
            report.write_losses(trainer.state.log_history, settings, Path(arguments.output_dir).parent)
    if stop.stopped:
        raise Stopped(f"stopped at step {trainer.state.global_step}: the same command goes on from there")
    return trainer


def load(settings: Settings, options: PatternOptions) -> Any:
    """The model to train: all weights in float32, or in the precision of the run with adapters in float32."""
    set_seed(settings.seed)  # of the adapters
    low = settings.lora and settings.precision == "bf16"
    model = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.bfloat16 if low else torch.float32
    )
    use_power(model, options)
    model.config.use_cache = False  # packed texts need it, and so does gradient checkpointing
    spare_logits(model)
    if settings.lora:
        from peft import LoraConfig, get_peft_model

        # The head stays as it is: it would be the largest adapter, and what is to be learnt lies in the layers.
        adapter = LoraConfig(r=settings.lora, lora_alpha=2 * settings.lora, target_modules="all-linear")
        model = get_peft_model(model, adapter)
        model.enable_input_require_grads()
    return model


def arguments_of(settings: Settings, folder: Path, processes: int, save_every: int) -> TrainingArguments:
    """Trainer's arguments. Raises ValueError where the processes can not share a step, or lack bfloat16."""
    cuda = torch.cuda.is_available()
    if settings.precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"{torch.cuda.get_device_name()} does not compute in bfloat16: --precision fp32 works, at a fraction of "
            "the speed"
        )
    if settings.rows_in_step % processes:
        raise ValueError(
            f"{settings.rows_in_step} sequences of {settings.row:,} tokens a step can not be shared evenly by "
            f"{processes} processes: give --batch-tokens as a multiple of {processes * settings.row:,}"
        )
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.rows_in_step // processes,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=settings.rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        bf16=settings.precision == "bf16",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=save_every,
        save_total_limit=2,
        seed=settings.seed,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        disable_tqdm=True,
        report_to="none",
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The last one that was written to its end, which its state says: it comes last."""
    found = sorted(
        folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), reverse=True
    )
    return next((path for path in found if _whole(path / "trainer_state.json")), None)


def _whole(state: Path) -> bool:
    try:
        json.loads(state.read_text())
    except (OSError, ValueError):
        return False
    return True
