"""The shipped model's task over the OpenAI API: a passkey in a long text, asked for at its end."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_power.tools.common import passkey_data as data
from vllm_power.tools.common.vllm_server import Server
from vllm_power.tools.demo.requests import Answer, answer, client_of, failing_as

MODEL = Path(__file__).with_name("passkey_model")
# So far back that a sliding window does not hand them on in the model's few layers; none across the border of two
# blocks, as one at 25 % of 32,768 tokens would be (docs/passkey.md says how much harder that is).
DEPTHS = (0.05, 0.15, 0.27, 0.35, 0.45)


@dataclass(frozen=True)
class Hidden:
    """A prompt, the five digits in it, and the share of the text before them."""

    prompt: str
    digits: str
    depth: float


def hide(tokens: int, seed: int = 0) -> list[Hidden]:
    """A prompt for each of ``DEPTHS``, with its answer ``tokens`` tokens. Raises ValueError where that is too short."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    hidden = []
    for depth in DEPTHS:
        batch = data.sample(1, tokens, generator, depth=(depth, depth))
        tokens_asked, digits = batch.prompt(0)
        hidden.append(Hidden(data.text(tokens_asked), digits, depth))
    return hidden


def answers(server: Server, model: str, prompts: list[Hidden]) -> Iterator[tuple[Hidden, Answer]]:
    """Ask for each passkey, greedily. Raises ServerFailed where the server refuses one or does not answer."""
    client = client_of(server)
    for hidden in prompts:
        start = time.monotonic()
        with failing_as(server):
            got = client.completions.create(
                model=model, prompt=hidden.prompt, max_tokens=len(data.ANSWER), temperature=0
            )
        title = f"Passkey at {hidden.depth:.0%}"
        yield hidden, answer(title, hidden.prompt, got.choices[0].text, got.usage, start)


def found(hidden: Hidden, text: str) -> bool:
    """Whether a text begins with the passkey, spaces aside."""
    return text.strip().startswith(hidden.digits)
