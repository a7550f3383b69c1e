"""``vllm-power calibrate`` on recall: which dense layers bring hidden numbers back under the row rule in force."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from vllm_power import options
from vllm_power.tools.calibrate import report_recall
from vllm_power.tools.calibrate.choose import check_budget
from vllm_power.tools.calibrate.choose_recall import greedy, passes
from vllm_power.tools.calibrate.needles import Needles, Score, mean_likelihood
from vllm_power.tools.calibrate.report import option_line
from vllm_power.tools.calibrate.run import REMEDY_DENSE, loaded_model
from vllm_power.tools.common.command_options import json_object
from vllm_power.tools.common.recall import TASKS, Example, Tasks, read_text

DEFAULT_LAYERS = options.MODES["training_free"]["dense_layers"]


def run_recall(
    model: str,
    budget: int,
    text: Path | None = None,
    given: str | None = None,
    context: int = 8192,
    n: int = 8,
    held_out: int = 32,
    tasks: tuple[str, ...] = TASKS,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    folder: Path = Path("calibration"),
) -> list[int]:
    """Print and write what was measured; return the layers proposed. Arguments as in ``vllm-power calibrate --help``.

    Raises ValueError for options or a budget that do not fit the model, and if the dense model finds too little.
    """
    console = Console()
    asked = json_object(given or "{}", "--power")
    if "dense_layers" in asked:
        raise ValueError(REMEDY_DENSE)
    loaded, tokenizer, stored = loaded_model(model, dtype, device)
    served = options.resolve(asked, stored.set_by_user if stored else None)
    text_config = loaded.config.get_text_config()
    context = min(context, text_config.max_position_embeddings)
    pattern = served.effective_pattern
    if context <= pattern.dense_tokens:
        raise ValueError(
            f"prompts of {context:,} tokens say nothing: up to {pattern.dense_tokens:,} tokens this pattern is plain "
            "causal attention. Take longer --tokens"
        )
    bar = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*bar, console=console) as progress:
        line = progress.add_task("finding needles", total=None)
        needles = Needles(loaded, served, lambda share: progress.advance(line, share))
        check_budget(budget, len(needles.candidates))
        made = Tasks(tokenizer, None if text is None else read_text(text), text_config.bos_token_id)
        numbered = [
            [made.example(task, context, index, seed) for index in range(n + held_out)] for task in tasks
        ]
        console.print(
            f"{model} on {loaded.device}, {str(loaded.dtype).removeprefix('torch.')}; {pattern}, {_told(served)}; "
            f"{context:,} tokens",
            soft_wrap=True,
        )
        to_choose = [example for found in numbered for example in found[:n]]
        to_report = [example for found in numbered for example in found[n:]]
        searched = passes(needles.candidates, needles.num_layers, budget)
        total = len(to_choose) * (2 + searched) + 4 * len(to_report)
        progress.update(line, total=total)
        known = _known(to_choose, needles.dense(to_choose))
        progress.update(line, total=total - (len(to_choose) - len(known)) * (1 + searched))
        start = mean_likelihood(needles.scores([], known))
        steps = greedy(
            needles.candidates,
            budget,
            start,
            lambda kept, tried: needles.with_one_more(kept, tried, known),
        )
        proposed = sorted(step.layer for step in steps)
        default = sorted(options.indices(DEFAULT_LAYERS, needles.num_layers) & frozenset(needles.candidates))
        sets: dict[str, tuple[list[int] | None, list[Score]]] = {
            "dense": (None, needles.dense(to_report)),
            "proposed": (proposed, needles.scores(proposed, to_report)),
            "default": (default, needles.scores(default, to_report)),
            "none": ([], needles.scores([], to_report)),
        }
        progress.update(line, completed=progress.tasks[0].total)

    about = {
        "model": model,
        "objective": "recall",
        "pattern": str(pattern),
        "options": served.set_by_user,
        "text": None if text is None else text.name,
        "context": context,
        "chosen_on": len(known),
        "dtype": str(loaded.dtype),
        "budget": budget,
        "seed": seed,
        "none_kept": start,
    }
    told = report_recall.summary(sets, to_report)
    report_recall.show(console, steps, told, len(known), start)
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "calibrate.jsonl"
    rows = [{**about, "sets": told, "dense_layers": proposed}, *map(report_recall.step_row, steps)]
    written.write_text("".join(json.dumps(row) + "\n" for row in rows))
    title = f"{Path(model).name}, {pattern}, {context:,} tokens"
    report_recall.plot(steps, told, start, title, folder / "calibrate.svg")
    console.print(f"Written: {written}, {folder / 'calibrate.svg'}", soft_wrap=True)
    console.print("\nServe it with\n", style="bold")
    wanted = options.PatternOptions(
        **{k: v for k, v in asked.items() if k in options.PatternOptions.model_fields}
    )
    others = {name: value for name, value in asked.items() if name not in options.PatternOptions.model_fields}
    line_to_paste = option_line(wanted, stored, proposed, others)
    console.print(line_to_paste, soft_wrap=True, markup=False, highlight=False)
    return proposed


def _told(served: options.PowerOptions) -> str:
    return f"mode {served.mode}: dense_tail {served.dense_tail}, decode {served.decode}"


def _known(examples: Sequence[Example], scores: Sequence[Score]) -> list[Example]:
    """The prompts that the dense model answers: what it cannot find says nothing about layers."""
    known = [example for example, score in zip(examples, scores, strict=True) if score.exact]
    if not known:
        raise ValueError(
            f"the dense model answers none of {len(examples)} prompts, so there is nothing to keep: take shorter "
            "--tokens, other --tasks or --objective divergence"
        )
    return known
