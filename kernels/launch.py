"""Launch a kernel again without asking Triton which variant fits: that takes most of the host's time for a launch."""

from collections.abc import Hashable
from typing import Any

_compiled: dict[Hashable, Any] = {}


def launch(
    kernel: Any, variant: Hashable, grid: tuple[int, int, int], arguments: tuple[Any, ...], **options: Any
) -> None:
    """``kernel[grid](*arguments, **options)``, where ``arguments`` are all of the kernel's, in order.

    variant: alike only for launches that Triton would compile alike. The first launch of a variant goes through Triton;
    later ones use what it found.
    """
    compiled = _compiled.get((kernel, variant))
    if compiled is None:
        _compiled[kernel, variant] = kernel[grid](*arguments, **options)
    else:
        compiled[grid](*arguments)
