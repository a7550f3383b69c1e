"""Rows that see every earlier token (``pattern.RowRule``), computed over the pattern's output.

They are few (the end of a prompt, and its answer), so a layer first computes every row under the pattern.
"""

from collections.abc import Sequence

import torch

from vllm_power.hf.documents import Row
from vllm_power.hf.segments import causal
from vllm_power.pattern import RowRule

IGNORED = -100  # the label of tokens without a loss


def prompt_tokens(labels: torch.Tensor) -> list[int]:
    """The prompt length of each row, from the labels: the number of tokens before the first label that is not -100.

    labels: int [rows, tokens], one text per row. A row without labels is a prompt as a whole.
    """
    found = labels != IGNORED
    first = found.int().argmax(1)
    return torch.where(found.any(1), first, labels.shape[1]).tolist()


def replaced(
    output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: tuple[Row, ...],
    prompts: Sequence[int],
    rule: RowRule,
    scale: float,
) -> torch.Tensor:
    """``output`` with the rows that see everything computed densely; a new tensor if there are any.

    output: [rows, H, Q, Dv]; query: [rows, H, Q, D], the last Q of the K tokens; key: [rows, G, K, D]; value:
    [rows, G, K, Dv]. rows: the documents of each row. prompts: prompt tokens per document, in the order of ``rows``.

    Raises ValueError if there is not one number per document.
    """
    documents = [(row, document) for row, found in enumerate(rows) for document in found]
    if len(prompts) != len(documents):
        raise ValueError(f"power_prompt_tokens has {len(prompts)} numbers, there are {len(documents)} texts")
    first = key.shape[2] - query.shape[2]
    result = output
    for (row, (start, end)), prompt in zip(documents, prompts, strict=True):
        low, high = rule.dense_rows(int(prompt))
        low, high = max(start + low, first), min(start + high, end)
        if low >= high:
            continue
        if result is output:
            result = output.clone()
        one = slice(row, row + 1)
        asked = query[one, :, low - first : high - first]
        states = key[one, :, start:high], value[one, :, start:high]
        result[one, :, low - first : high - first] = causal(asked, *states, scale)
    return result
