"""What Gluon has under one name in Triton 3.6 and under another one in 3.9."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Start a TMA copy of one box into shared memory: descriptor, coordinates, the barrier that counts its bytes, target.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def reinterpreted(boxes, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory under another shape and layout."""
    if HAS_REINTERPRET:
        return boxes.reinterpret(boxes.dtype, shape, layout)
    else:
        return boxes._reinterpret(boxes.dtype, shape, layout)
