"""Which layers to keep dense, from measured effects.

Three ways, all measured in the end, since what ranks best depends on the model:

- by output: the layers whose own attention the pattern changes most. One pass, but blind to what the change does.
- alone: the layers that move the next token most when only they are sparse. Blind to layers that stand in for each
  other: either alone may be missed by nothing.
- greedy: from all layers sparse, keep dense the layer that brings the distribution back the most, then the next. It
  follows what will be served. Past the first step only the most promising few are tried again, so that the cost
  stays bounded: twice the layers, and a few passes for each layer kept.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vllm_power.tools.calibrate.measure import Effect

TRIED_AGAIN = 4  # layers measured again in each step of the greedy way past its first

Measure = Callable[[Iterable[int]], Effect]


@dataclass
class Choice:
    """What was measured on the way.

    none_kept: the effect with every layer sparse. alone: {layer: the effect when only this layer is sparse}.
    kept: the greedy way's layers in order, each with the effect that is left once it is dense too.
    sets: {way: (its layers, their effect)}.
    """

    none_kept: Effect
    alone: dict[int, Effect] = field(default_factory=dict)
    kept: list[tuple[int, Effect]] = field(default_factory=list)
    sets: dict[str, tuple[list[int], Effect]] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """The way whose layers leave the smallest divergence; of equals, the first of greedy, alone, by output."""
        return min(self.sets, key=lambda way: self.sets[way][1].kl)


def check_budget(budget: int, candidates: int) -> None:
    """Raises ValueError if the budget is not at least 1, or leaves none of the ``candidates`` to the pattern."""
    if not 0 < budget < candidates:
        raise ValueError(
            f"a budget of {budget} dense layers does not fit: {candidates} layers could run the pattern, and at least "
            "one of them has to"
        )


def choose(candidates: list[int], budget: int, measure: Measure, output_errors: dict[int, float]) -> Choice:
    """The layers of ``candidates`` to keep. measure: the effect, by the layers that are dense."""
    choice = Choice(none_kept=measure([]))
    for layer in candidates:
        choice.alone[layer] = measure(set(candidates) - {layer})

    gains: dict[
        int, float
    ] = {}  # what each layer brought when it was last tried; later it mostly brings less
    left, tried = choice.none_kept, list(candidates)
    for _ in range(budget):
        kept = [layer for layer, _ in choice.kept]
        effects = {layer: measure([*kept, layer]) for layer in tried}
        gains |= {layer: left.kl - effect.kl for layer, effect in effects.items()}
        taken = max(effects, key=lambda layer: (gains[layer], -layer))
        left = effects[taken]
        choice.kept.append((taken, left))
        del gains[taken]
        tried = sorted(gains, key=lambda layer: (-gains[layer], layer))[:TRIED_AGAIN]

    choice.sets["greedy"] = sorted(layer for layer, _ in choice.kept), left
    orders = {
        "alone": sorted(candidates, key=lambda layer: (-choice.alone[layer].kl, layer)),
        "by output": sorted(candidates, key=lambda layer: (-output_errors[layer], layer)),
    }
    for way, order in orders.items():
        layers = sorted(order[:budget])
        choice.sets[way] = layers, measure(layers)
    return choice


def passes(layers: int, budget: int) -> int:
    """How often :func:`choose` measures."""
    again = sum(min(TRIED_AGAIN, layers - kept) for kept in range(1, budget))
    return 1 + layers + layers + again + 2
