"""Scores answers alone: prompt and answer as one prompt, while nothing else runs and with a prefix cache of its own.

The rows of an answer were computed one by one or as drafts, in a batch with others, from cached and preempted
prefixes. Here they are computed in one prefill, so equal log-probabilities mean that each row saw the right keys. Two
sums in another order may choose another token, which changes all later ones; an answer that is scored has no such fork.

That a greedily chosen token is the best one is vLLM's sampler, not attention. In vLLM 0.32 on the CPU it is not when
drafts are checked in a batch with requests that sample: the temperatures of the drafts are left uninitialised
(``vllm/utils/cpu_triton_utils.py::_expand_kernel_impl`` fills a copy). So the load never mixes the two.
"""

from dataclasses import dataclass

import httpx

from soak.client import Outcome, Sample
from soak.served import NAME

# In nats. Logits of size 40 are rounded to 40 * 2**-24 = 2.4e-6 in float32; measured: 1.1e-5 at worst, which is a few
# roundings. A wrong mask moves log-probabilities by 0.4 on average (support/random_model.py).
TOLERANCE = 1e-4


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
