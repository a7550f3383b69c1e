"""``vllm-power probe``: make prompts, read them, train the probes, write rows and plot."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_power.hf import layers
from vllm_power.hf.attention import use_power
from vllm_power.options import of_pattern
from vllm_power.tools.common import results
from vllm_power.tools.probe import texts
from vllm_power.tools.probe.plot import plot
from vllm_power.tools.probe.reach import reached
from vllm_power.tools.probe.score import accuracies
from vllm_power.tools.probe.states import pooled


def run(
    model: str,
    *,
    options: dict[str, object] | None,
    keys: Sequence[str],
    tokens: int,
    depth: float,
    samples: int,
    seed: int,
    dtype: str,
    device: str,
    folder: Path,
) -> None:
    """Print, append to probe.jsonl and draw what was measured. Arguments as in ``vllm-power probe --help``.

    options: as under ``power`` in vLLM's --additional-config, put together with the checkpoint's as the server does.
    Raises ValueError for what does not fit together.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    console = Console()
    disable_progress_bar()
    config = AutoConfig.from_pretrained(model)
    text_config = config.get_text_config()
    wanted = of_pattern(options, config)
    pattern = wanted.effective_pattern
    if tokens % pattern.block_size or tokens > text_config.max_position_embeddings:
        raise ValueError(
            f"--tokens must be whole blocks of {pattern.block_size} tokens and at most the model's "
            f"{text_config.max_position_embeddings:,}, not {tokens:,}"
        )
    blocks, count = tokens // pattern.block_size, text_config.num_hidden_layers
    prompts = texts.make(
        AutoTokenizer.from_pretrained(model),
        keys,
        samples=samples,
        tokens=tokens,
        block_size=pattern.block_size,
        depth=depth,
        seed=seed,
    )
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=device).eval()
    use_power(loaded, wanted)
    console.print(
        f"{model} on {loaded.device}: {pattern}; {samples:,} prompts of {tokens:,} tokens, the key in block "
        f"{prompts.block} of {blocks}",
        soft_wrap=True,
    )
    apart = wanted.dense_layer_indices(count) | layers.keeping_their_own(text_config)
    reach = reached(pattern, apart, count, prompts.block, blocks)
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rows = []
    with Progress(*bar, console=console) as progress:
        reading = progress.add_task("prompts read", total=samples)
        states = pooled(
            loaded.base_model, prompts.tokens, pattern.block_size, lambda: progress.advance(reading)
        )
        scoring = progress.add_task("layers probed", total=count + 1)
        for layer, shares in enumerate(accuracies(states, prompts.labels, seed)):
            progress.advance(scoring)
            rows.append(
                {
                    "bench": "probe",
                    "model": "/".join(Path(model).parts[-2:]),
                    "pattern": str(pattern),
                    "layer": layer,
                    "tokens": tokens,
                    "block_size": pattern.block_size,
                    "blocks": blocks,
                    "key_block": prompts.block,
                    "keys": len(keys),
                    "samples": samples,
                    "accuracy": [round(share, 4) for share in shares],
                    "reached": reach[layer],
                }
            )
    written = results.append("probe", rows, folder)
    drawn = plot(results.rows(folder, "probe"), folder / "probe.svg")
    for row in rows:
        console.print(told(row), soft_wrap=True, highlight=False)
    console.print(f"Written: {written}, {drawn}", soft_wrap=True)


def told(row: results.Row) -> str:
    """A layer's row as a line: the mean accuracy where the key can have got to, and beyond."""
    inside = [row["accuracy"][block] for block in row["reached"]]
    outside = [share for block, share in enumerate(row["accuracy"]) if block not in row["reached"]]
    beyond = f", elsewhere {sum(outside) / len(outside):.0%}" if outside else ""
    return (
        f"after {row['layer']:2} layers: the key can be in {len(inside)} of {row['blocks']} blocks, told there "
        f"{sum(inside) / len(inside):.0%}{beyond}, in the last block {row['accuracy'][-1]:.0%} "
        f"(chance {1 / row['keys']:.0%})"
    )
