"""The next-token loss from the last hidden states, without the logits of more than a few thousand tokens at a time.

Logits of a row of 32K tokens and a vocabulary of 152,064 need 10 GB in bfloat16, and their gradient as much again.
Here they are made, turned into their own gradient and used up chunk by chunk, in the forward pass; what is kept is the
gradient of the hidden states and of the head's weight.
"""

from typing import Any

import torch
import torch.nn.functional as F

LOGITS = 2**29  # numbers at a time: 1 GB in bfloat16
IGNORED = -100  # transformers' label of a token that is not predicted


def linear_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    teacher: tuple[torch.Tensor, torch.Tensor] | None = None,
    share: float = 0.0,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum over all tokens that have a label, in nats, float32.

    hidden: [rows, length, width]; weight: [vocabulary, width], of the head; labels: int64 [rows, length], each a token
    itself: those of the following tokens are predicted. teacher: hidden states and weight of the model whose next-token
    distribution is learnt; ``share`` of the loss is then the divergence (KL) from it, the rest cross entropy.
    weights: float32 [rows, length], by which the loss of predicting each token counts; None: 1.

    Products are in autocast's dtype, else in that of ``hidden``. Differentiable by hidden and weight.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    following = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
    counts = (following != IGNORED).float()
    if weights is not None:
        counts = counts * F.pad(weights, (0, 1))[:, 1:].flatten()
    with torch.autocast(device, enabled=False):
        states = hidden.flatten(0, 1).to(dtype)
        taught = None if teacher is None else tuple(part.detach().to(dtype) for part in teacher)
        return _LinearLoss.apply(states, weight, following, counts, taught, share)


class _LinearLoss(torch.autograd.Function):
    """hidden: [tokens, width]; labels: [tokens], IGNORED for tokens without one, whose weights [tokens] are 0."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        teacher: tuple[torch.Tensor, torch.Tensor] | None,
        share: float,
    ) -> torch.Tensor:
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        low = weight.to(hidden.dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        size = max(1, LOGITS // len(weight))
        turn = _turned() if hidden.is_cuda else turn_into_gradient
        for begin in range(0, len(hidden), size):
            states, wanted = hidden[begin : begin + size], labels[begin : begin + size]
            logits = states @ low.T
            aim = None
            if teacher is not None:
                aim = teacher[0].flatten(0, -2)[begin : begin + size] @ teacher[1].T
            loss, gradient = turn(logits, wanted, weights[begin : begin + size], aim, share)
            total += loss
            if of_hidden is not None:
                torch.mm(gradient, low, out=of_hidden[begin : begin + size])
            if of_weight is not None:
                of_weight += gradient.T @ states
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, direction: torch.Tensor) -> tuple[Any, ...]:
        of_hidden, of_weight = ctx.saved_tensors
        return (
            None if of_hidden is None else of_hidden * direction.to(of_hidden.dtype),
            None if of_weight is None else (of_weight * direction).to(ctx.dtype),
            None,
            None,
            None,
            None,
        )


def turn_into_gradient(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, aim: torch.Tensor | None, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of some tokens, summed, and its gradient by the logits in their dtype.

    logits and aim (the teacher's logits): [tokens, vocabulary]; labels and weights: [tokens].
    """
    scores = logits.float()
    log_sum = scores.logsumexp(1)
    # A token without a label has the weight 0, whatever index stands in here.
    picked = scores.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    loss = log_sum - picked
    probabilities = (scores - log_sum[:, None]).exp()
    tokens = torch.arange(logits.shape[1], device=logits.device)
    target = (tokens[None, :] == labels[:, None]).float()
    if aim is not None:
        aims = aim.float()
        taught = (aims - aims.logsumexp(1)[:, None]).exp()
        # sum of p log(p / q), with log p and log q from the same shifted scores
        divergence = (taught * ((aims - aims.logsumexp(1)[:, None]) - (scores - log_sum[:, None]))).sum(1)
        loss = (1 - share) * loss + share * divergence
        target = (1 - share) * target + share * taught
    gradient = (probabilities - target) * weights[:, None]
    return (loss * weights).sum(), gradient.to(logits.dtype)


_compiled: list[Any] = []


def _turned() -> Any:
    """:func:`turn_into_gradient` as few kernels."""
    if not _compiled:
        _compiled.append(torch.compile(turn_into_gradient, dynamic=False))
    return _compiled[0]
