"""``vllm-power probe``: linear probes of hidden states, per layer and block (paper, section 4.6).

Each prompt hides one of a few keys in filler (appendix C). For every layer and block, a logistic regression predicts
the key from the hidden states, averaged over the block. The pattern's graph says which blocks the key can reach at all.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vllm_power.hf import layers
from vllm_power.hf.attention import use_power
from vllm_power.options import of_pattern
from vllm_power.pattern import Pattern, preset
from vllm_power.tools.common import results
from vllm_power.tools.common.passkey_data import ADJECTIVES, NOUNS
from vllm_power.tools.common.tokenizer import tokenizer_of
from vllm_power.tools.probe.plot import plot

SENTENCES = tuple(f" The {noun} is {adjective}." for noun in NOUNS for adjective in ADJECTIVES)
HELD_OUT = 0.25  # share of the samples that the accuracy is measured on


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
    """Measure, print, append the rows to probe.jsonl and draw them. Arguments as in ``vllm-power probe --help``.

    options: the object under ``power`` in vLLM's --additional-config, merged with the checkpoint's as in the server.
    Raises ValueError if the arguments do not fit the model or each other.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
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
    prompts = make_prompts(
        tokenizer_of(model),
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
        console.print(summary(row), soft_wrap=True, highlight=False)
    console.print(f"Written: {written}, {drawn}", soft_wrap=True)


def summary(row: results.Row) -> str:
    """One layer's row as a line: the mean accuracy in the blocks that the key can reach, and in the others."""
    inside = [row["accuracy"][block] for block in row["reached"]]
    outside = [share for block, share in enumerate(row["accuracy"]) if block not in row["reached"]]
    elsewhere = f", {sum(outside) / len(outside):.0%} in the others" if outside else ""
    return (
        f"after {row['layer']:2} layers: the key can reach {len(inside)} of {row['blocks']} blocks; accuracy "
        f"{sum(inside) / len(inside):.0%} in these{elsewhere}, {row['accuracy'][-1]:.0%} in the last block "
        f"(chance {1 / row['keys']:.0%})"
    )


# --- prompts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """tokens: int64 [samples, tokens]; labels: int64 [samples], the key in each prompt; block: the key's block."""

    tokens: torch.Tensor
    labels: torch.Tensor
    block: int


def make_prompts(
    tokenizer: Any,
    keys: Sequence[str],
    *,
    samples: int,
    tokens: int,
    block_size: int,
    depth: float,
    seed: int,
) -> Prompts:
    """Prompts of ``tokens`` tokens that hide the keys equally often, in the block at ``depth``.

    tokenizer: a transformers tokenizer. depth: share of the text before the key, 0 to 1. The position of the key's
    sentence in its block is random. Raises ValueError if the tokenizer cannot distinguish the keys, or if the sentence
    is longer than a block.
    """
    sentences = [_ids(tokenizer, sentence) for sentence in SENTENCES]
    needles = [_ids(tokenizer, f" The passkey is {key}.") for key in keys]
    unknown = tokenizer.unk_token_id
    if len(set(map(tuple, needles))) < len(keys):
        raise ValueError(f"the tokenizer cannot distinguish the keys {', '.join(keys)}: choose other --keys")
    for key, needle in zip(keys, needles, strict=True):
        if unknown is not None and unknown in needle:
            raise ValueError(
                f"the tokenizer does not know all of {key!r}: choose --keys from words that it knows"
            )
    longest = max(map(len, needles))
    block = min(int(depth * tokens), tokens - longest) // block_size
    room = min(block_size, tokens - block * block_size) - longest
    if room < 0:
        raise ValueError(f"the sentence with the key has {longest} tokens, more than fit into block {block}")

    generator = torch.Generator().manual_seed(seed)
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    average = sum(map(len, sentences)) / len(sentences)
    labels = torch.arange(samples) % len(keys)
    rows = []
    for label in labels.tolist():
        start = block * block_size + int(torch.randint(room + 1, (), generator=generator))
        filler = list(first)
        while len(filler) < tokens:
            drawn = torch.randint(len(sentences), (int(tokens / average) + 1,), generator=generator)
            filler += [token for sentence in drawn.tolist() for token in sentences[sentence]]
        rows.append((filler[:start] + needles[label] + filler[start:])[:tokens])
    return Prompts(torch.tensor(rows), labels, block)


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found


# --- states, accuracy, reach ----------------------------------------------------------------------------------------


@torch.inference_mode()
def pooled(
    model: Any, tokens: torch.Tensor, block_size: int, on_prompt: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """Hidden states averaged per block: float32 [layers + 1, blocks, samples, width] on the CPU, embeddings first.

    model: a transformers model without its head; the last entry is after its final norm. tokens: int64
    [samples, tokens], whole blocks. ``on_prompt`` is called after each prompt.
    """
    config = model.config.get_text_config()
    samples, length = tokens.shape
    states = torch.empty(
        config.num_hidden_layers + 1, length // block_size, samples, config.hidden_size, dtype=torch.float32
    )
    for sample, prompt in enumerate(tokens):
        found = model(prompt[None].to(model.device), use_cache=False, output_hidden_states=True).hidden_states
        for layer, state in enumerate(found):
            states[layer, :, sample] = state[0].float().unflatten(0, (-1, block_size)).mean(1).cpu()
        on_prompt()
    return states


def accuracies(states: torch.Tensor, labels: torch.Tensor, seed: int = 0) -> Iterator[list[float]]:
    """Accuracy of the probes on held-out samples, 0 to 1: one list over the blocks per layer.

    states: float32 [layers, blocks, samples, width]; labels: int64 [samples].
    """
    train, test = train_test_split(
        numpy.arange(len(labels)), test_size=HELD_OUT, stratify=labels.numpy(), random_state=seed
    )
    with Parallel(n_jobs=-1) as parallel:
        for layer in states:
            yield parallel(delayed(_accuracy)(block.numpy(), labels.numpy(), train, test) for block in layer)


def _accuracy(
    states: NDArray[numpy.float32],
    labels: NDArray[numpy.int64],
    train: NDArray[numpy.int64],
    test: NDArray[numpy.int64],
) -> float:
    """Accuracy on ``test`` of a regression fitted to ``train``. states: [samples, width]; labels: [samples]."""
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    return float(regression.fit(states[train], labels[train]).score(states[test], labels[test]))


def reached(
    pattern: Pattern, dense_layers: Collection[int], layers: int, key: int, blocks: int
) -> list[list[int]]:
    """The blocks that block ``key`` can have reached, ascending: for the embeddings, then after each layer.

    dense_layers: the layers that do not run the pattern; they are assumed to see everything.
    """
    full = preset("full", block_size=pattern.block_size)
    known = {key}
    found = [sorted(known)]
    for layer in range(layers):
        sees = full if layer in dense_layers else pattern
        known |= {q for q in range(key, blocks) if not known.isdisjoint(sees.visible_blocks(q))}
        found.append(sorted(known))
    return found
