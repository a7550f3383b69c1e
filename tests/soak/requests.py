"""The load: requests of every kind, drawn from a seed."""

import math
import random
from dataclasses import dataclass
from enum import Enum
from typing import Any

from support.prompts import random_tokens

from soak.served import NAME

SHORTEST, LONGEST = 10, 30_000
DOCUMENTS = [random_tokens(LONGEST, seed) for seed in range(1, 4)]
SAMPLED_UP_TO = 3_000  # tokens of a prompt with several samples: each sample is scored with its whole prompt


class Cut(Enum):
    """What the client does before the answer is complete."""

    NEVER = "waits"
    IN_STREAM = "hangs up in mid-stream"
    BEFORE = "hangs up before the answer"


@dataclass(frozen=True)
class Request:
    """cut_after: pieces of the stream, or seconds."""

    prompt: list[int]
    samples: int
    max_tokens: int
    greedy: bool
    stream: bool
    cut: Cut
    cut_after: float

    def body(self) -> dict[str, Any]:
        # Without a seed: on vLLM 0.32's CPU a seed ends the engine when a prompt is computed in chunks.
        return {
            "model": NAME,
            "prompt": self.prompt,
            "n": self.samples,
            "max_tokens": self.max_tokens,
            "temperature": 0.0 if self.greedy else 1.0,
            "stream": self.stream,
            "logprobs": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }


def mixed(generator: random.Random, greedy: bool) -> Request:
    """Lengths are spread evenly over the logarithm, so that nearly every prompt has a new one."""
    length = round(math.exp(generator.uniform(math.log(SHORTEST), math.log(LONGEST))))
    prompt = random_tokens(length, generator.randrange(1 << 20))
    if generator.random() < 0.5:
        shared = generator.randint(1, length)
        prompt = generator.choice(DOCUMENTS)[:shared] + prompt[shared:]
    samples = 1 if greedy or length > SAMPLED_UP_TO else generator.randint(1, 4)
    cut = generator.choices(list(Cut), [70, 15, 15])[0]
    return Request(
        prompt=prompt,
        samples=samples,
        max_tokens=generator.randint(1, 400 if length <= SAMPLED_UP_TO else 40),
        greedy=greedy,
        stream=cut is Cut.IN_STREAM or (cut is Cut.NEVER and generator.random() < 0.5),
        cut=cut,
        cut_after=generator.randint(1, 20) if cut is Cut.IN_STREAM else generator.uniform(0.0, 10.0),
    )


def growing(generator: random.Random, greedy: bool) -> Request:
    """A short prompt and a long answer, from 1 to 5 pages to 6 to 8: many outgrow the pool, so some are preempted.

    Others hold most pages when their prompt is computed, and give back more than they take from then on.
    """
    return Request(
        prompt=random_tokens(generator.randint(SHORTEST, 300), generator.randrange(1 << 20)),
        samples=1 if greedy else generator.randint(1, 2),
        max_tokens=generator.randint(320, 400),
        greedy=greedy,
        stream=generator.random() < 0.5,
        cut=Cut.NEVER,
        cut_after=0,
    )
