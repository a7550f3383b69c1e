"""The passkey grid as token ids, for models trained on the project's own passkey documents."""

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

from vllm_power.tools.evals.endpoint import Endpoint
from vllm_power.tools.evals.grids import judged
from vllm_power.tools.evals.items import Item, Result
from vllm_power.tools.evals.settings import Settings


def items(settings: Settings) -> Iterator[Item]:
    """Every length, depth and sample, short prompts first."""
    for length in settings.lengths:
        for depth in settings.depths:
            for index in range(settings.samples):
                ask = partial(_ask, length=length, depth=depth, number=index, seed=settings.seed)
                identity = {"seed": settings.seed, "prompts": "tokens"}
                yield Item("passkey", length, index, ask, depth, identity)


def prompt(length: int, depth: float, number: int, seed: int) -> tuple[list[int], str]:
    """Token ids up to the question's end, and the five digits. With the answer they are ``length`` tokens."""
    import torch

    from vllm_power.tools.common.passkey_data import sample

    generator = torch.Generator().manual_seed(
        random.Random(f"{seed} passkey {length} {depth} {number}").getrandbits(63)
    )
    batch = sample(1, length, generator, depth=(depth, depth))
    tokens, digits = batch.prompt(0)
    return tokens.tolist(), digits


async def _ask(endpoint: Endpoint, *, length: int, depth: float, number: int, seed: int) -> Result:
    from vllm_power.tools.common.passkey_data import ANSWER

    tokens, expected = prompt(length, depth, number, seed)
    answer = await endpoint.answer(tokens, max_tokens=len(ANSWER))
    return judged(answer.text, expected, answer.prompt_tokens)


def is_spoken_by(tokenizer: Any) -> bool:
    """Whether a tokenizer makes of a passkey document's text the token ids that the document has."""
    import torch

    from vllm_power.tools.common.passkey_data import SHORTEST, sample, text

    tokens = sample(1, SHORTEST + 20, torch.Generator().manual_seed(0)).tokens[0]
    return bool(tokenizer(text(tokens)).input_ids == tokens.tolist())
