"""What launchers ask about a device at every launch, cached."""

import functools

import torch


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 for the interpreter, enough to split keys over programs."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU, for example (9, 0); (0, 0) without one."""
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.get_device_capability(device)
