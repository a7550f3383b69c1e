"""The next-token loss without float32 copies of all logits, which for long rows need more memory than the layers do."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 4096  # tokens whose logits are in float32 at a time: 2.5 GB for a vocabulary of 152,064


def spare_logits(model: Any) -> None:
    """Let a transformers model compute its loss in chunks, and return the loss without logits in training."""
    forward = model.forward

    @functools.wraps(forward)
    def without_logits(*given: Any, **named: Any) -> Any:
        output = forward(*given, **named)
        if model.training and output.loss is not None:
            output.logits = None  # accelerate would make a float32 copy of them
        return output

    model.forward = without_logits
    model.loss_function = chunked_loss


def chunked_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    label_weights: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    """What transformers' loss for causal models is: logits [rows, length, vocabulary], labels [rows, length].

    num_items_in_batch: what to divide by; None: the tokens that have a label. label_weights: float32 [rows, length], by
    which the loss of predicting each token counts; None: 1.
    """
    following = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    weights = torch.ones_like(labels, dtype=torch.float32) if label_weights is None else label_weights
    weights = F.pad(weights, (0, 1))[:, 1:]
    total = logits.new_zeros((), dtype=torch.float32)
    chunks = (part.split(CHUNK, dim=1) for part in (logits, following, weights))
    for some, wanted, counts in zip(*chunks, strict=True):
        total = total + checkpoint(_summed, some, wanted, counts, ignore_index, use_reentrant=False)
    count = (following != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count


def _summed(
    logits: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    flat = logits.flatten(0, 1).float()
    losses = F.cross_entropy(flat, wanted.flatten(), ignore_index=ignore_index, reduction="none")
    return losses @ weights.flatten()
