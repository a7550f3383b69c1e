"""How many rows of a step fit into a GPU's memory at once, and whether layers must be computed twice for it."""

from collections.abc import Callable
from typing import Any

import torch

# Larger batches are not faster: the kernels are full.
ENOUGH_TOKENS = 131_072

# Of the memory that is left: the allocator's pieces never fit without gaps.
USABLE = 0.85

# Bytes of AdamW's two moments for a trained weight.
MOMENTS = 8


def plan_memory(
    model: Any, rows: int, length: int, loss_of: Callable[[int], torch.Tensor], device: torch.device
) -> tuple[int, bool]:
    """(rows at once, which divide ``rows``; whether to checkpoint gradients), for all processes the same.

    loss_of: the loss of a number of rows of ``length`` tokens, ready for ``backward``. Without a GPU: one row, with
    checkpoints. Raises ValueError if not even that fits.
    """
    if device.type != "cuda":
        return 1, True
    checkpoints = False
    taken = _bytes_of_a_row(model, loss_of)
    if taken is None:
        checkpoints = True
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        taken = _bytes_of_a_row(model, loss_of)
        model.gradient_checkpointing_disable()
    if taken is None:
        raise ValueError(
            f"one row of {length:,} tokens does not fit into the memory of {torch.cuda.get_device_name(device)}, not "
            "even with gradient checkpointing: train shorter --stages, adapters (--lora), or share the model by FSDP"
        )
    free, _ = torch.cuda.mem_get_info(device)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    left = free - (MOMENTS + 4) * trained
    fit = min(int(USABLE * left / taken), ENOUGH_TOKENS // length, rows)
    fit = _least_of_all(max(1, fit), device)
    return next(count for count in range(fit, 0, -1) if rows % count == 0), checkpoints


def _bytes_of_a_row(model: Any, loss_of: Callable[[int], torch.Tensor]) -> int | None:
    """What a row takes in addition to weights and their gradients, at its highest; None if it does not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = None
    try:
        loss = loss_of(1)
        loss.backward()
        gradients = sum(weight.grad.nbytes for weight in model.parameters() if weight.grad is not None)
        return max(1, torch.cuda.max_memory_allocated() - before - gradients)
    except torch.OutOfMemoryError:
        return None
    finally:
        del loss
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def _least_of_all(count: int, device: torch.device) -> int:
    if not torch.distributed.is_initialized():
        return count
    least = torch.tensor(count, device=device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return int(least)
