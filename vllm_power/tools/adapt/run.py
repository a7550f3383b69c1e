"""``vllm-power adapt``: check, read, evaluate, train, save, evaluate again."""

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from vllm_power.hf.attention import use_power
from vllm_power.options import PatternOptions, of_pattern
from vllm_power.tools.adapt import data, report
from vllm_power.tools.adapt.evaluate import perplexities
from vllm_power.tools.adapt.export import export, save_weights
from vllm_power.tools.adapt.facts import ASKED
from vllm_power.tools.adapt.recall import Hider
from vllm_power.tools.adapt.settings import Settings
from vllm_power.tools.adapt.train import arguments_of, sharded, train
from vllm_power.tools.common import results
from vllm_power.tools.common.tokenizer import tokenizer_of

FEWEST_BLOCKS = 4  # of a sequence with a probe


def run(settings: Settings, output: Path, save_every: int = 100) -> None:
    """Leave a model in ``output``; resumes if a run of the same settings was cut off.

    Raises ValueError for what does not fit together, FloatingPointError where the loss is not sound, Stopped.
    """
    disable_progress_bar()  # of files that are read and written
    config = AutoConfig.from_pretrained(settings.model)
    options = of_pattern(settings.power, config)
    check_model(settings, config, options)
    tokenizer = tokenizer_of(settings.model)
    state = PartialState(cpu=not torch.cuda.is_available())
    console = Console(quiet=not state.is_main_process)
    arguments = arguments_of(settings, output / "checkpoints", state.num_processes, save_every)
    settings.check_folder(output)
    with state.main_process_first():
        rows, windows = read(settings, tokenizer, output / "cache", not options.rows.has_dense_rows)
    dense_tokens = options.effective_pattern.dense_tokens
    hidden = rows.hidden_share(dense_tokens)
    console.print(
        f"{settings.steps:,} steps of {settings.batch_tokens:,} tokens, {options.effective_pattern}; the data are read "
        f"{rows.passes:.2f} times; the pattern hides something from {hidden:.0%} of the last stage's tokens",
        soft_wrap=True,
    )
    if not hidden and options.pattern != "full":
        raise ValueError(
            f"no token would be trained under the pattern: the first {dense_tokens:,} tokens of a text see everything. "
            "Give longer --stages, or longer documents, or leave out --apart"
        )
    if state.is_main_process:
        settings.write(output)

    asker = Hider(tokenizer, ASKED) if settings.recall else None

    def evaluate(model: str, when: str) -> list[report.Row]:
        about = {"when": when, **(results.machine() if state.is_main_process else {})}
        return perplexities(model, options, windows, settings.dtype, state, about, asker)

    measured = [row for row in results.rows(output, report.PERPLEXITY) if row["when"] == "before"]
    if windows and not measured:
        console.print("evaluating the model as it is")
        measured = evaluate(settings.model, "before")
        if state.is_main_process:
            report.write(measured, output, report.PERPLEXITY)
    trainer = train(settings, options, rows, tokenizer, arguments, console)

    if settings.probe:
        del trainer.model.relay  # it is no part of the model that is served
    weights = output / ("adapter" if settings.lora else "unfinished")
    save_weights(trainer, weights)
    if state.is_main_process:
        export(weights, settings, options, config, tokenizer, output)
        if not settings.lora:
            shutil.rmtree(weights)
    trainer.accelerator.free_memory()
    del trainer
    state.wait_for_everyone()
    if windows:
        console.print("evaluating the trained model")
        measured += evaluate(str(output), "after")
        if state.is_main_process:
            report.write(measured, output, report.PERPLEXITY)
            report.plot_perplexity(measured, output)
            console.print(report.table(measured))
            if (recalled := report.recall_table(measured)) is not None:
                console.print(recalled)
    console.print(f"Serve it with\n\nvllm serve {output} --attention-backend power", soft_wrap=True)


def check_probe(settings: Settings, options: PatternOptions) -> None:
    """Raises ValueError if a probe would teach nothing, or cannot be a part of the training."""
    if settings.lora or not settings.recall or options.rows.has_dense_rows or options.pattern == "full":
        raise ValueError(
            "--probe teaches the layers to pass on what --recall hides, where no row sees everything: give --recall, "
            'and leave out --lora, the options dense_tail and decode, and the pattern "full"'
        )
    if sharded():
        raise ValueError(
            "--probe was not tried with weights that are shared out: train without FSDP, or without it"
        )
    size = options.effective_pattern.block_size
    for stage in settings.stages:
        if stage.length % size or stage.length < FEWEST_BLOCKS * size:
            raise ValueError(
                f"--probe asks whole blocks, here of {size} tokens, and a sequence needs some after the fact's: a "
                f"stage of {stage.length:,} tokens is not a multiple of {size} of at least {FEWEST_BLOCKS * size:,}"
            )


def check_model(settings: Settings, config: Any, options: PatternOptions) -> None:
    """Raises ValueError if the model cannot be trained like this, before anything is read or computed."""
    if settings.probe:
        check_probe(settings, options)
    use_power(AutoConfig.from_pretrained(settings.model), options)
    text = config.get_text_config()
    longest, known = settings.row, getattr(text, "max_position_embeddings", None)
    if known and longest > known:
        raise ValueError(
            f"sequences of {longest:,} tokens are longer than the model's {known:,} positions "
            "(max_position_embeddings). Train shorter --stages, or let a copy of the model scale its rotary positions: "
            "rope_parameters in its config.json, and max_position_embeddings as long as the sequences"
        )
    if getattr(text, "attention_dropout", 0.0):
        raise ValueError(
            f"the model has attention_dropout {text.attention_dropout}, which the pattern's kernels do not do: set it "
            "to 0 in config.json"
        )


def read(
    settings: Settings, tokenizer: Any, cache: Path, ask_anywhere: bool = False
) -> tuple[data.Rows, dict[int, torch.Tensor]]:
    """The rows of the training, and the windows of the evaluation by length.

    Held-out text that was not given is cut from the beginning of the documents in their random order.
    """
    line = data.Line.of(data.tokenized(settings.data, settings.field, tokenizer, cache), settings.seed)
    if settings.held_out:
        held = data.Line.of(
            data.tokenized(settings.held_out, settings.field, tokenizer, cache), settings.seed
        )
    else:
        held, line = line.split(settings.eval_tokens)
    begin = data.begin_token(tokenizer)
    rows = data.Rows(line, settings, begin, Hider(tokenizer) if settings.recall else None, ask_anywhere)
    lengths = sorted({stage.length for stage in settings.stages}) if settings.eval_tokens else []
    if lengths and held.tokens < lengths[-1]:
        raise ValueError(
            f"the held-out text has {held.tokens:,} tokens, fewer than a window of {lengths[-1]:,}: give more, or "
            "--eval-tokens of at least one window, or 0 for no evaluation"
        )
    return rows, {length: data.windows(held, length, settings.eval_tokens, begin) for length in lengths}
