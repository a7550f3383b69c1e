"""Figures from finished items: accuracies with their confidence, perplexities, agreements."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_power.tools.common.intervals import wilson
from vllm_power.tools.evals.items import Item
from vllm_power.tools.evals.logprobs import agreement
from vllm_power.tools.evals.settings import GRIDS, LOGPROBS
from vllm_power.tools.evals.store import Store


@dataclass(frozen=True)
class Accuracy:
    """The mean score of ``count`` answers and its 95% confidence interval; depth is None over all depths."""

    task: str
    length: int
    depth: float | None
    accuracy: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Unanswered:
    """``count`` of ``of`` questions that got no answer, and why; no accuracy counts them."""

    task: str
    length: int
    count: int
    of: int
    why: str


@dataclass(frozen=True)
class Perplexity:
    """Over all windows of one length; by_position is {first position of a part: perplexity there}."""

    length: int
    perplexity: float
    windows: int
    tokens: int
    by_position: dict[int, float]


@dataclass(frozen=True)
class Agreement:
    """With the dense model over all places of one length; kl is the mean divergence in nats."""

    length: int
    top1: float
    low: float
    high: float
    kl: float
    perplexity: float
    dense_perplexity: float
    windows: int
    tokens: int


@dataclass(frozen=True)
class Figures:
    """Everything that a report shows. ruler is the mean over RULER's families that were measured at a length."""

    accuracies: list[Accuracy]
    ruler: list[Accuracy]
    cells: list[Accuracy]
    perplexities: list[Perplexity]
    agreements: list[Agreement]
    unanswered: list[Unanswered] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, for JSON."""
        return asdict(self)


def figures(items: Iterable[Item], store: Store, folder: Path) -> Figures:
    """Sum up the finished ones of ``items``; folder has the files of logprobs."""
    by_cell: dict[tuple[str, int, float | None], list[dict[str, Any]]] = defaultdict(list)
    windows: dict[tuple[int, int], dict[str, dict[str, Any]]] = defaultdict(dict)
    for item in items:
        if (result := store.result(item)) is None:
            continue
        by_cell[item.task, item.length, item.depth].append(result)
        if item.task.startswith("agreement"):
            windows[item.length, item.index][item.task] = result

    whole: dict[tuple[str, int], list[float]] = defaultdict(list)
    missing: dict[tuple[str, int], list[str]] = defaultdict(list)
    cells = []
    for (task, length, depth), results in by_cell.items():
        if not task.startswith(LOGPROBS):
            scores = [result["score"] for result in results if "no_answer" not in result]
            whole[task, length] += scores
            missing[task, length] += [result["no_answer"] for result in results if "no_answer" in result]
            if depth is not None and scores:
                cells.append(accuracy(task, length, depth, scores))
    accuracies = [accuracy(task, length, None, scores) for (task, length), scores in whole.items() if scores]
    return Figures(
        accuracies=accuracies,
        ruler=ruler_means(accuracies),
        cells=cells,
        perplexities=[
            perplexity(length, results)
            for (task, length, _), results in by_cell.items()
            if task == "perplexity"
        ],
        agreements=agreements(windows, folder),
        unanswered=[
            Unanswered(
                task, length, len(reasons), len(reasons) + len(whole[task, length]), most_common(reasons)
            )
            for (task, length), reasons in missing.items()
            if reasons
        ],
    )


def most_common(words: list[str]) -> str:
    """The word that is there most often."""
    return max(words, key=words.count)


def accuracy(task: str, length: int, depth: float | None, scores: list[float]) -> Accuracy:
    """The mean of scores between 0 and 1, with its interval."""
    low, high = wilson(sum(scores), len(scores))
    return Accuracy(task, length, depth, sum(scores) / len(scores), low, high, len(scores))


def ruler_means(accuracies: list[Accuracy]) -> list[Accuracy]:
    """The mean over RULER's families for each length, with equal weights; none if fewer than two were measured."""
    by_length: dict[int, list[Accuracy]] = defaultdict(list)
    for point in accuracies:
        if point.task not in GRIDS:
            by_length[point.length].append(point)
    means = []
    for length, points in sorted(by_length.items()):
        if len(points) > 1:
            count = sum(point.count for point in points)
            mean = sum(point.accuracy for point in points) / len(points)
            means.append(Accuracy("ruler", length, None, mean, *wilson(mean * count, count), count))
    return means


def perplexity(length: int, results: list[dict[str, Any]]) -> Perplexity:
    """Perplexity over the windows of one length."""
    tokens = sum(result["tokens"] for result in results)
    loss = sum(result["loss"] * result["tokens"] for result in results) / tokens
    parts: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for result in results:
        for start, count, summed in result["by_position"]:
            parts[start][0] += count
            parts[start][1] += summed
    positions = {start: math.exp(summed / count) for start, (count, summed) in sorted(parts.items())}
    return Perplexity(length, math.exp(loss), len(results), tokens, positions)


def agreements(windows: dict[tuple[int, int], dict[str, dict[str, Any]]], folder: Path) -> list[Agreement]:
    """Compare the windows that both models were asked about."""
    by_length: dict[int, list[dict[str, float]]] = defaultdict(list)
    for (length, _), results in windows.items():
        if len(results) == 2:
            ours, dense = results["agreement"], results["agreement_dense"]
            pair = agreement(folder / ours["file"], folder / dense["file"])
            losses = {"loss": ours["loss"] * pair["tokens"], "dense_loss": dense["loss"] * pair["tokens"]}
            by_length[length].append(pair | losses)
    return [agreement_at(length, pairs) for length, pairs in by_length.items()]


def agreement_at(length: int, pairs: list[dict[str, float]]) -> Agreement:
    """The agreement over the windows of one length, from their sums."""
    total = {name: sum(pair[name] for pair in pairs) for name in pairs[0]}
    tokens = total["tokens"]
    low, high = wilson(total["same_top"], int(tokens))
    return Agreement(
        length=length,
        top1=total["same_top"] / tokens,
        low=low,
        high=high,
        kl=total["kl"] / tokens,
        perplexity=math.exp(total["loss"] / tokens),
        dense_perplexity=math.exp(total["dense_loss"] / tokens),
        windows=len(pairs),
        tokens=int(tokens),
    )
