"""The training itself: the model, its optional teacher and adapters, and the Trainer's arguments."""

import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from vllm_power.hf.attention import use_power
from vllm_power.options import PatternOptions
from vllm_power.tools.adapt import report
from vllm_power.tools.adapt.callbacks import Bar, Sound
from vllm_power.tools.adapt.data import Rows
from vllm_power.tools.adapt.engine import (
    Collator,
    Planner,
    as_teacher,
    compile_layers,
    has_plain_logits,
    speed_up,
)
from vllm_power.tools.adapt.loop import fill_memory, run_to_the_end, training_arguments
from vllm_power.tools.adapt.loss import spare_logits
from vllm_power.tools.adapt.relay import Relay
from vllm_power.tools.adapt.settings import Settings


def train(
    settings: Settings,
    options: PatternOptions,
    rows: Rows,
    tokenizer: Any,
    arguments: TrainingArguments,
    console: Console,
) -> Trainer:
    """Train to the end and return the trainer; the losses are written however it ends.

    Raises Stopped, and FloatingPointError if the loss is not sound.
    """
    device = arguments.device
    model, planner = load(settings, options, device)
    collate = Collator(planner, options)
    if planner is not None and not sharded():
        model.to(device)

        def loss_of(count: int) -> torch.Tensor:
            batch = collate([rows[len(rows) - 1]] * count)  # of the longest texts
            return model(**{name: part.to(device) for name, part in batch.items()}).loss

        fill_memory(arguments, model, settings.row, loss_of, console)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[Sound(settings)],
    )

    def describe(step: int, logs: dict[str, Any]) -> str:
        told = f", probe {model.relay.summary()}" if settings.probe else ""
        return f"sequences of {settings.length_at(step - 1):,}, loss {float(logs['loss']):.3f}{told}"

    def write_losses() -> None:
        if trainer.is_world_process_zero():
            report.write_losses(trainer.state.log_history, settings, Path(str(arguments.output_dir)).parent)

    bar = Bar(settings.steps, settings.batch_tokens, describe, console)
    run_to_the_end(trainer, bar, console, write_losses)
    return trainer


def load(settings: Settings, options: PatternOptions, device: torch.device) -> tuple[Any, Planner | None]:
    """The model to train: its weights in float32, or in the precision of the run with adapters in float32.

    And what plans its batches, if the kernels can do all of it on ``device``. Raises ValueError if
    ``distill`` or ``probe`` is asked of a model whose logits are more than its head's product.
    """
    set_seed(settings.seed)  # of the adapters
    low = settings.dtype if settings.lora else torch.float32
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=low)
    use_power(model, options)
    model.config.use_cache = False  # packed texts need it, and so does gradient checkpointing
    plain = has_plain_logits(model)
    planner = None
    if plain and Planner.suits(model.config, device):
        planner = Planner(model.config, options, settings.dtype, every_layer_dense=settings.distill > 0)
    teacher = None
    if settings.distill:
        if not plain:
            raise ValueError(
                f"--distill compares next-token distributions, and {settings.model} does more to its logits than "
                "its head: it works without --distill"
            )
        original = AutoModelForCausalLM.from_pretrained(settings.model, dtype=settings.dtype)
        teacher = as_teacher(original, device)
        if planner is not None:
            compile_layers(original)
    if not (settings.lora or settings.embeddings):
        # Adam moves the rows of tokens that the data lack as far as those of frequent ones, by gradients near zero.
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            part.requires_grad_(False)
    relay = None
    if settings.probe:
        if not plain:
            raise ValueError(
                f"--probe takes part in a loss that {settings.model} does not have, since it does more to its logits "
                "than its head: it works without --probe"
            )
        relay = Relay(model.config.get_text_config().hidden_size, options.effective_pattern.block_size)
    if plain:
        speed_up(
            model,
            options,
            settings.dtype,
            teacher=teacher,
            share=settings.distill,
            relay=relay,
            probe=settings.probe,
        )
    else:
        spare_logits(model)
    if settings.lora:
        from peft import LoraConfig, get_peft_model

        # The head stays as it is: it would be the largest adapter, and what is to be learnt lies in the layers.
        adapter = LoraConfig(r=settings.lora, lora_alpha=2 * settings.lora, target_modules="all-linear")
        wrapped = get_peft_model(model, adapter)
        wrapped.enable_input_require_grads()
        if planner is not None:
            compile_layers(model)
        return wrapped, planner
    if planner is not None:
        compile_layers(model)
    return model, planner


def sharded() -> bool:
    """Whether accelerate shares the weights out: what one process holds then says nothing of what fits."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")


def arguments_of(settings: Settings, folder: Path, processes: int, save_every: int) -> TrainingArguments:
    """Trainer's arguments. Raises ValueError if the processes cannot share a step, or lack bfloat16."""
    cuda = torch.cuda.is_available()
    if settings.precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"{torch.cuda.get_device_name()} does not compute in bfloat16: --precision fp32 works, at a fraction of "
            "the speed"
        )
    if settings.rows_in_step % processes:
        raise ValueError(
            f"{settings.rows_in_step} sequences of {settings.row:,} tokens a step cannot be shared evenly by "
            f"{processes} processes: give --batch-tokens as a multiple of {processes * settings.row:,}"
        )
    return training_arguments(
        folder,
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.rows_in_step // processes,
        learning_rate=settings.rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        bf16=settings.precision == "bf16",
        gradient_checkpointing=True,
        ddp_find_unused_parameters=False,
        logging_steps=1,
        save_steps=save_every,
        save_total_limit=2,
        seed=settings.seed,
    )
