"""Random prompts: the same for the same length and seed."""

import random

VOCABULARY = range(4, 512)  # without the special tokens


def random_tokens(length: int, seed: int = 0) -> list[int]:
    return random.Random(1_000_003 * seed + length).choices(VOCABULARY, k=length)
