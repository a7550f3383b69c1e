"""Which tokens of a batch form one text: blocks are counted from each text's first token, as when it is served alone.

A **document** is a run (start, end) of one row's tokens, end excluded. A row without padding is one document, a row of
packed training data has several, and padding belongs to none. All indices are key indices: with a cache, the cached
tokens come first.
"""

from collections.abc import Callable
from itertools import pairwise

import torch

Document = tuple[int, int]
Row = tuple[Document, ...]


def of_labels(labels: torch.Tensor) -> tuple[Row, ...]:
    """The documents of each row. labels: int [rows, tokens], the same number for tokens of one text, 0 for padding.

    Raises ValueError if a text has a hole.
    """
    rows = []
    for row in labels.cpu():
        numbers, lengths = torch.unique_consecutive(row, return_counts=True)
        ends = lengths.cumsum(0).tolist()
        runs = [
            (number, (end - length, end))
            for number, length, end in zip(numbers.tolist(), lengths.tolist(), ends, strict=True)
            if number
        ]
        if len({number for number, _ in runs}) < len(runs):
            raise ValueError(
                "attention_mask has padding inside a text: the pattern counts blocks from the first token to the last. "
                "Pad at the ends only; to generate, on the left (tokenizer.padding_side = 'left')."
            )
        rows.append(tuple(document for _, document in runs))
    return tuple(rows)


def of_lengths(cumulative: torch.Tensor, tokens: int) -> tuple[Row, ...]:
    """The documents of one row of ``tokens`` tokens.

    cumulative: int [documents + 1], as transformers' ``cu_seq_lens_q``: 0, then the end of each.

    Raises ValueError if the numbers do not rise from 0 to at most ``tokens``.
    """
    ends = cumulative.tolist()
    pairs = list(pairwise(ends))
    if not ends or ends[0] != 0 or ends[-1] > tokens or any(start > end for start, end in pairs):
        raise ValueError(f"cu_seq_lens_q must rise from 0 to at most the row's {tokens} tokens, not {ends}")
    return (tuple((start, end) for start, end in pairs if start < end),)


def labels(
    sees: Callable[..., torch.Tensor] | None, real: torch.Tensor | None, rows: int, tokens: int
) -> torch.Tensor:
    """The labels for :func:`of_labels`, int [rows, tokens], on the device of ``real`` or on the CPU.

    sees: transformers' mask function of (row, head, query, key), which separates packed texts; None: one text per row.
    real: bool [rows, tokens], False for padding; None: no padding.

    Raises ValueError if ``sees`` is not causal attention within texts, because the pattern cannot represent it.
    """
    device = real.device if real is not None else torch.device("cpu")
    numbers = torch.ones(rows, tokens, dtype=torch.long, device=device)
    if sees is not None:
        numbers += _boundaries(sees, rows, tokens).to(device).cumsum(1)
    return numbers if real is None else numbers * real


def _boundaries(sees: Callable[..., torch.Tensor], rows: int, tokens: int) -> torch.Tensor:
    """bool [rows, tokens]: the tokens that do not see the token before them, except for the first token of a row."""
    row = torch.arange(rows)[:, None]
    token = torch.arange(tokens)[None, :]
    before = (token - 1).clamp(min=0)
    head = torch.zeros_like(row)

    def told(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return sees(row, head, query, key).expand(rows, tokens).cpu()

    boundary = ~told(token, before)
    first = torch.where(boundary, token, 0).cummax(1).values
    after = (token + 1).clamp(max=tokens - 1)
    causal = told(token, token) & told(token, first) & ~(told(token, after) & (after > token))
    apart = ~(told(token, (first - 1).clamp(min=0)) & (first > 0))
    if not (causal & apart).all():
        raise ValueError(
            "the model needs its own mask (tokens that see later ones, or chunks), which the pattern cannot "
            "represent. Remove what causes it, or use another attention implementation."
        )
    return boundary
