"""Scores answers alone: prompt and answer as one prompt, while nothing else runs and with a prefix cache of its own.

The rows of an answer were computed one by one or as drafts, beside others, from cached and preempted prefixes. Here
they are computed in one prefill, so equal log-probabilities mean that each row saw the right keys. Two sums in another
order may choose another token, which changes all later ones; an answer that is scored has no such fork.
"""

from dataclasses import dataclass

import httpx

from soak.client import Outcome, Sample
from soak.served import NAME

# Log-probabilities in float32, of two computations of the same rows. Logits spread over about 30, hence an error of
# 30 * 2**-23 per operation at the end; measured over 400 answers: see docs/reliability.md. A wrong mask moves them by
# 0.4 on average (support/random_model.py).
TOLERANCE = 2e-3


@dataclass(frozen=True)
class Difference:
    """logprobs: the largest difference; best: how much better another token was than a greedily chosen one."""

    logprobs: float
    best: float

    @property
    def tolerable(self) -> bool:
        return self.logprobs <= TOLERANCE and self.best <= TOLERANCE


async def score(client: httpx.AsyncClient, outcome: Outcome, salt: str) -> list[Difference]:
    """The difference of each sample of an answer. Raises httpx.HTTPError if the server refuses."""
    return [
        await _score(client, outcome, sample, f"{salt}-{number}")
        for number, sample in enumerate(outcome.samples)
    ]


async def _score(client: httpx.AsyncClient, outcome: Outcome, sample: Sample, salt: str) -> Difference:
    body = {
        "model": NAME,
        "prompt": outcome.request.prompt + sample.tokens,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 1,
        "cache_salt": salt,
    }
    answer = await client.post("/v1/completions", json=body)
    answer.raise_for_status()
    (choice,) = answer.json()["choices"]
    rows = choice["prompt_logprobs"][-len(sample.tokens) :]
    told = [row[str(token)]["logprob"] for row, token in zip(rows, sample.tokens, strict=True)]
    worst = max(abs(mine - theirs) for mine, theirs in zip(told, sample.logprobs, strict=True))
    missed = 0.0
    if outcome.request.greedy:
        best = [max(entry["logprob"] for entry in row.values()) for row in rows]
        missed = max(above - own for above, own in zip(best, told, strict=True))
    return Difference(worst, missed)
