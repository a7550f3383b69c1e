"""How often the passkey comes back, by length and depth, under any pattern."""

from collections.abc import Iterator
from typing import Any

import torch

from vllm_power.pattern import Pattern
from vllm_power.tools.common import passkey_data as data
from vllm_power.tools.passkey.packing import pack
from vllm_power.tools.passkey.train import Trainer, digit_columns

CONTEXTS = (1_024, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536)
DEPTHS = 20


@torch.no_grad()
def evaluate(
    trainer: Trainer, pattern: Pattern, context: int, per_depth: int, seed: int = 1
) -> Iterator[dict[str, Any]]:
    """A row for each of ``DEPTHS`` equal shares of the context: ``correct`` of ``total`` passkeys placed inside it.

    ``depth`` is the middle of the share, 0 the start and 1 right before the question. A passkey is right when each of
    its digits is the likeliest token after the right ones before it: exactly when greedy decoding writes it.
    """
    device = trainer.device
    generator = torch.Generator(device).manual_seed(seed)
    documents = max(1, trainer.settings.tokens // context)
    packing = pack(pattern, documents, context, trainer.settings.sizes, device)
    shares = torch.arange(DEPTHS, device=device).repeat(per_depth)
    correct = torch.zeros(DEPTHS, dtype=torch.int64, device=device)
    for chunk in shares.split(documents):
        share = torch.cat((chunk, chunk.new_zeros(documents - len(chunk))))
        batch = data.sample(documents, context, generator, depth=(share / DEPTHS, (share + 1) / DEPTHS))
        hidden = trainer.hidden(packing, batch.tokens)
        positions = batch.answer_positions()[:, digit_columns()]
        at_digits = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        guesses = trainer.model.lm_head(at_digits).argmax(-1) - data.FIRST_DIGIT
        right = (guesses == batch.digits).all(-1)[: len(chunk)]
        correct.index_add_(0, chunk, right.long())
    for number, count in enumerate(correct.tolist()):
        yield {
            "bench": "passkey",
            "pattern": pattern.name,
            "trained": trainer.settings.pattern,
            "width": trainer.settings.width,
            "steps": trainer.step,
            "seed": trainer.settings.seed,
            "probe": trainer.settings.probe,
            "context": context,
            "depth": round((number + 0.5) / DEPTHS, 3),
            "correct": count,
            "total": per_depth,
        }
