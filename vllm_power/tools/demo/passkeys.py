"""The packaged model's task over the OpenAI API: a passkey in a long text, and a question about it at the end."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_power.tools.common import passkey_data as data
from vllm_power.tools.common.vllm_server import Server
from vllm_power.tools.demo.requests import Answer, answer, client_of, failing_as

MODEL = Path(__file__).with_name("passkey_model")
# Too far back for a sliding window to relay them through the model's few layers. None crosses a block boundary, as one
# at 25% of 32,768 tokens would; docs/passkey.md measures how much harder that is.
DEPTHS = (0.05, 0.15, 0.27, 0.35, 0.45)


@dataclass(frozen=True)
class Hidden:
    """A prompt, its five-digit passkey, and the share of the text before the passkey."""

    prompt: str
    digits: str
    depth: float


def hide(tokens: int, seed: int = 0) -> list[Hidden]:
    """A prompt per depth, with ``tokens`` tokens including its answer. Raises ValueError if that is too few."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    hidden = []
    for depth in DEPTHS:
        batch = data.sample(1, tokens, generator, depth=(depth, depth))
        tokens_asked, digits = batch.prompt(0)
        hidden.append(Hidden(data.text(tokens_asked), digits, depth))
    return hidden


def answers(server: Server, model: str, prompts: list[Hidden]) -> Iterator[tuple[Hidden, Answer]]:
    """Ask for each passkey with greedy decoding. Raises ServerFailed if the server refuses or does not answer."""
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
    """Whether a text starts with the passkey, ignoring leading spaces."""
    return text.strip().startswith(hidden.digits)
