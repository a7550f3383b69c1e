"""Prompts that hide one of a few keys in sentences of filler, as token ids (paper, appendix C)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_power.tools.common.passkey_data import ADJECTIVES, NOUNS

SENTENCES = tuple(f" The {noun} is {adjective}." for noun in NOUNS for adjective in ADJECTIVES)


@dataclass(frozen=True)
class Prompts:
    """tokens: int64 [samples, tokens]; labels: int64 [samples], which key each hides; block: where all of it lies."""

    tokens: torch.Tensor
    labels: torch.Tensor
    block: int


def make(
    tokenizer: Any,
    keys: Sequence[str],
    *,
    samples: int,
    tokens: int,
    block_size: int,
    depth: float,
    seed: int,
) -> Prompts:
    """Prompts of ``tokens`` tokens, each key in as many of them, its sentence in the block at ``depth``.

    tokenizer: transformers'. depth: the share of the text before the key, 0 to 1. The sentence moves about within its
    block. Raises ValueError where the tokenizer can not tell the keys apart, or the sentence is longer than a block.
    """
    sentences = [_ids(tokenizer, sentence) for sentence in SENTENCES]
    needles = [_ids(tokenizer, f" The passkey is {key}.") for key in keys]
    unknown = tokenizer.unk_token_id
    if len(set(map(tuple, needles))) < len(keys):
        raise ValueError(f"the tokenizer does not tell the keys {', '.join(keys)} apart: take other --keys")
    for key, needle in zip(keys, needles, strict=True):
        if unknown is not None and unknown in needle:
            raise ValueError(
                f"the tokenizer does not know all of {key!r}: take --keys of words that it knows"
            )
    longest = max(map(len, needles))
    block = min(int(depth * tokens), tokens - longest) // block_size
    room = min(block_size, tokens - block * block_size) - longest
    if room < 0:
        raise ValueError(f"a key's sentence has {longest} tokens, more than fit into block {block}")

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
