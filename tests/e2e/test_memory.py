"""A thousand requests leave nothing behind."""

from collections.abc import Callable
from pathlib import Path

from support import generation
from support.engine_worker import Worker
from support.prompts import random_tokens

BATCH = 50
ALLOWED_GROWTH = 2 << 20  # bytes over the last 800 requests; measured: none


def test_memory_is_flat_over_a_thousand_requests(small_model: Callable[..., Path], worker: Worker) -> None:
    """Prompts of 1 to 1,900 tokens; the process grows no more after the first 200."""
    model = small_model("llama", num_heads=4, num_kv_heads=2, head_size=64)
    # A small cache: its memory counts once a page is first used, and all are by the time that counting starts.
    worker.start(model, enable_prefix_caching=False, max_model_len=2048, kv_cache_memory_bytes=32 << 20)
    resident = []
    for batch in range(1000 // BATCH):
        # The same lengths each time: torch keeps something for every new shape of a matrix product.
        lengths = [1900 if number == 0 else 1 + number * 37 % 150 for number in range(BATCH)]
        prompts = [random_tokens(length, seed=batch) for length in lengths]
        worker.call(generation.greedy, prompts, 4, False)
        resident.append(worker.run(generation.resident_bytes))
    print("MiB after every 50 requests:", [round(size / 2**20, 1) for size in resident])
    assert resident[-1] - resident[3] <= ALLOWED_GROWTH
