"""Which layers to keep dense so that right answers become likely: from none, the layer that helps most, and again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_power.tools.calibrate.needles import Score, mean_likelihood

TRIED_AGAIN = 6  # layers that are tried in each step after the first: those that helped most when last tried

# {layer: scores with the kept layers and this one dense}, by (kept, tried).
OneMore = Callable[[Sequence[int], Sequence[int]], dict[int, list[Score]]]


@dataclass
class Step:
    """One layer that was kept. likelihood, exact: of all prompts, with it. tried: {layer: mean likelihood with it}."""

    layer: int
    likelihood: float
    exact: int
    tried: dict[int, float] = field(default_factory=dict)


def greedy(candidates: Sequence[int], budget: int, none_kept: float, one_more: OneMore) -> list[Step]:
    """At most ``budget`` layers, in the order in which they were chosen; fewer if no other one helps.

    none_kept: the mean likelihood with every layer sparse.
    """
    steps: list[Step] = []
    likelihood, tried, gains = none_kept, list(candidates), dict[int, float]()
    while tried and len(steps) < budget:
        kept = [step.layer for step in steps]
        scores = one_more(kept, tried)
        means = {layer: mean_likelihood(found) for layer, found in scores.items()}
        gains |= {layer: mean - likelihood for layer, mean in means.items()}
        best = max(means, key=lambda layer: (means[layer], -layer))
        if means[best] <= likelihood:
            break
        likelihood = means[best]
        steps.append(Step(best, likelihood, sum(score.exact for score in scores[best]), means))
        del gains[best]
        tried = sorted(gains, key=lambda layer: (-gains[layer], layer))[:TRIED_AGAIN]
    return steps


def passes(candidates: Sequence[int], num_layers: int, budget: int) -> float:
    """About how many whole forward passes per prompt :func:`greedy` takes, if trials share the layers below them."""
    first = 1 + sum(1 - layer / num_layers for layer in candidates)
    return first + (budget - 1) * (1 + TRIED_AGAIN / 2)
