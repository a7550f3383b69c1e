"""Relaunch a compiled kernel directly. Triton's per-launch specialization dominates the CPU launch overhead."""

from collections.abc import Hashable
from typing import Any

_compiled: dict[Hashable, Any] = {}


def launch(
    kernel: Any, variant: Hashable, grid: tuple[int, int, int], arguments: tuple[Any, ...], **options: Any
) -> None:
    """Run ``kernel[grid](*arguments, **options)``; ``arguments`` are all of the kernel's, in order.

    variant: equal only for launches that Triton would compile to the same variant. The first launch of a variant goes
    through Triton; later ones reuse its compiled kernel.
    """
    compiled = _compiled.get((kernel, variant))
    if compiled is None:
        _compiled[kernel, variant] = kernel[grid](*arguments, **options)
    else:
        compiled[grid](*arguments)
