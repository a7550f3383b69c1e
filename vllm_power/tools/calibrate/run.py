"""``vllm-power calibrate``: load the model, measure, propose, write."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_power import options
from vllm_power.hf import layers
from vllm_power.tools.calibrate import choose, report
from vllm_power.tools.calibrate.measure import Probe, windows
from vllm_power.tools.common.command_options import json_object
from vllm_power.tools.common.tokenizer import tokenizer_of

REMEDY_DENSE = "dense_layers is what calibrate looks for: leave it out of --power"


def run(
    model: str,
    budget: int,
    text: Path,
    given: str | None = None,
    tokens: int = 8192,
    count: int = 4,
    dtype: str = "auto",
    device: str = "auto",
    folder: Path = Path("calibration"),
) -> list[int]:
    """Print and write what was measured; return the layers proposed. Arguments as in ``vllm-power calibrate --help``.

    Raises ValueError for options, a budget or a text that do not fit the model.
    """
    from transformers import AutoConfig

    console = Console()
    config = AutoConfig.from_pretrained(model)
    wanted = _options(given, config)
    text_config = config.get_text_config()
    windowed = sorted(layers.keeping_their_own(text_config))
    choose.check_budget(budget, text_config.num_hidden_layers - len(windowed))
    loaded, tokenizer, stored = loaded_model(model, dtype, device)
    pattern = wanted.effective_pattern
    tokens = min(tokens, text_config.max_position_embeddings)
    samples = windows(text.read_text(), tokenizer, pattern, tokens, count)
    console.print(
        f"{model} on {loaded.device}, {str(loaded.dtype).removeprefix('torch.')}; {pattern}; {len(samples)} windows of "
        f"{samples.shape[1]:,} tokens",
        soft_wrap=True,
    )
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bar, console=console) as progress:
        task = progress.add_task("windows read", total=None)
        probe = Probe(loaded, wanted, samples, lambda: progress.advance(task))
        evaluations = 2 + choose.passes(len(probe.candidates), budget)
        progress.update(task, total=evaluations * len(samples))
        errors = probe.output_errors()
        choice = choose.choose(probe.candidates, budget, probe.effect, errors)

    measured, told = report.rows(choice, errors), report.summary(choice)
    report.show(console, told, measured)
    if windowed:
        named = ", ".join(map(str, windowed))
        console.print(
            f"Layers {named} have a window of their own and keep it; they need no place in the budget."
        )
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "model": model,
        "pattern": str(pattern),
        "text": text.name,
        "windows": len(samples),
        "tokens": samples.shape[1],
        "dtype": str(loaded.dtype),
        "budget": budget,
        "windowed_layers": windowed,
    }
    written = folder / "calibrate.jsonl"
    written.write_text("".join(json.dumps(row) + "\n" for row in [{**about, **told}, *measured]))
    report.plot(told, measured, f"{Path(model).name}, {pattern}", folder / "calibrate.svg")
    console.print(f"Written: {written}, {folder / 'calibrate.svg'}", soft_wrap=True)
    proposed = choice.sets[choice.best][0]
    console.print("\nServe it with\n", style="bold")
    console.print(report.option_line(wanted, stored, proposed), soft_wrap=True, markup=False, highlight=False)
    return proposed


def loaded_model(model: str, dtype: str, device: str) -> tuple[Any, Any, options.PatternOptions | None]:
    """The model in evaluation mode, its tokenizer and the options that its config stores, if any."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=device).eval()
    return loaded, tokenizer_of(model), _stored(loaded.config)


def _stored(config: Any) -> options.PatternOptions | None:
    """The options that the checkpoint stores, if any."""
    found = options.stored_in(config, config.get_text_config())
    return None if found is None else options.PatternOptions.model_validate(found)


def _options(given: str | None, config: Any) -> options.PatternOptions:
    """What --power and the checkpoint say, except for dense layers."""
    asked = json_object(given or "{}", "--power")
    if "dense_layers" in asked:
        raise ValueError(REMEDY_DENSE)
    found = options.of_pattern(asked, config).set_by_user
    return options.PatternOptions(**{name: value for name, value in found.items() if name != "dense_layers"})
