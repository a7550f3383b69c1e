"""Perplexity by length, and agreement with the dense model, both from the logprobs of a text's own tokens.

The text is cut into windows of each length. The model's logprobs of a window are kept in a file next to the results,
and so are the dense model's, so that one server can run after the other.

A list of the ``top`` best tokens leaves the others open. For the Kullback-Leibler divergence of a place all tokens that
either model lists are compared one by one, and the others as one. A token that only one model lists has, in the other,
at most that list's smallest probability, and is given it: so the divergence is, if anything, too small.
"""

import asyncio
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vllm_power.tools.evals.endpoint import Endpoint
from vllm_power.tools.evals.items import Item, Result, file_digest
from vllm_power.tools.evals.settings import EvalError, Settings

PLACES_AT_ONCE = 4096
LISTS_AT_ONCE = 2
SMALLEST = 1e-9  # the least that all tokens outside the lists have together


@dataclass(frozen=True)
class Windows:
    """Windows of one text as token ids: ``of(length)`` gives as many as there are, ``count`` at most."""

    tokens: list[int]
    first: list[int]
    count: int

    @classmethod
    def read(cls, path: Path, tokenizer: Any, count: int, longest: int) -> "Windows":
        """Cut the windows from the text's start. Each begins with the tokens that the tokenizer puts first."""
        # No more of a large file than can be needed, at 16 characters a token.
        text = path.read_text(errors="replace")[: longest * count * 16]
        first = tokenizer("").input_ids[:1]
        return cls(tokenizer(text, add_special_tokens=False).input_ids, first, count)

    def of(self, length: int) -> list[list[int]]:
        """Windows of length - 1 tokens: the server adds one. Raises EvalError if the text has not even one."""
        step = length - 1 - len(self.first)
        found = min(self.count, len(self.tokens) // step) if step > 0 else 0
        if not found:
            raise EvalError(
                f"the text has {len(self.tokens):,} tokens, too few for a window of {length:,}: "
                "give a longer --text or shorter --lengths"
            )
        return [self.first + self.tokens[at * step : (at + 1) * step] for at in range(found)]


def items(task: str, windows: Windows, settings: Settings, folder: Path) -> Iterator[Item]:
    """The windows as requests; ``task`` is perplexity, agreement or, of the dense model, agreement_dense."""
    top = 0 if task == "perplexity" else settings.top_logprobs
    # An answer with lists is hundreds of megabytes while it is read.
    turn = asyncio.Semaphore(LISTS_AT_ONCE)
    for length in settings.lengths:
        for index, tokens in enumerate(windows.of(length)):
            identity = {"tokens": file_digest(np.array(tokens, np.int64).tobytes()), "top": top}
            ask = partial(_perplexity, tokens) if not top else partial(_listed, tokens, top, folder, turn)
            yield Item(task, length, index, ask, identity=identity)


async def _perplexity(tokens: list[int], endpoint: Endpoint) -> Result:
    listed = await endpoint.prompt_logprobs(tokens, 0)
    own = [place[token] for place, token in zip(listed, tokens[1:], strict=True)]
    return {"loss": -float(np.mean(own)), "tokens": len(own), "by_position": by_position(own)}


def by_position(logprobs: list[float]) -> list[list[float]]:
    """[first position, tokens, summed loss] of the positions up to 256, and then up to each power of two."""
    edges = [0]
    while edges[-1] < len(logprobs):
        edges.append(edges[-1] * 2 or 256)
    parts = [(start, logprobs[start:end]) for start, end in pairwise(edges)]
    return [[start, len(part), -float(np.sum(part))] for start, part in parts]


async def _listed(
    tokens: list[int], top: int, folder: Path, turn: asyncio.Semaphore, endpoint: Endpoint
) -> Result:
    async with turn:
        places = await endpoint.prompt_logprobs(tokens, top)
    # [places, top]: the best tokens, best first. The token that stands there comes apart, as it may not be among them.
    best = [sorted(place.items(), key=lambda entry: -entry[1])[:top] for place in places]
    own = np.array([place[token] for place, token in zip(places, tokens[1:], strict=True)], dtype=np.float32)
    ids = np.array([[token for token, _ in place] for place in best], dtype=np.int32)
    logprobs = np.array([[logprob for _, logprob in place] for place in best], dtype=np.float32)
    path = folder / f"{file_digest(ids.tobytes() + logprobs.tobytes() + own.tobytes())}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, ids=ids, logprobs=logprobs, own=own)
    return {"file": path.name, "tokens": len(places), "loss": -float(own.mean(dtype=np.float64))}


def agreement(ours: Path, dense: Path) -> dict[str, float]:
    """Compare two files of one window: places, places with the same best token, and the divergence of dense from ours.

    The keys are tokens, same_top and kl, the last a sum over places in nats. Raises EvalError for a damaged file.
    """
    (ids, logprobs), (dense_ids, dense_logprobs) = map(_kept, (ours, dense))
    parts = range(0, len(ids), PLACES_AT_ONCE)
    kl = sum(
        divergence(dense_ids[part], dense_logprobs[part], ids[part], logprobs[part]).sum()
        for part in (slice(at, at + PLACES_AT_ONCE) for at in parts)
    )
    return {"tokens": len(ids), "same_top": int((ids[:, 0] == dense_ids[:, 0]).sum()), "kl": float(kl)}


def _kept(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path) as file:
            return file["ids"], file["logprobs"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise EvalError(
            f"{path} is damaged or missing ({error}): remove the line with its name from items.jsonl, and it is asked "
            "again"
        ) from error


def divergence(
    p_ids: np.ndarray, p_logprobs: np.ndarray, q_ids: np.ndarray, q_logprobs: np.ndarray
) -> np.ndarray:
    """KL(p || q) in nats, float64 [places], of lists of token ids and logprobs, each [places, top] (see above)."""
    p, q = np.exp(p_logprobs.astype(np.float64)), np.exp(q_logprobs.astype(np.float64))
    same = p_ids[:, :, None] == q_ids[:, None, :]  # [places, p's list, q's list]
    q_of_p = np.where(same.any(2), (same * q[:, None, :]).sum(2), q.min(1, keepdims=True))
    p_of_q = np.where(same.any(1), 0.0, p.min(1, keepdims=True))  # 0: counted in p's list already
    only_q = np.where(same.any(1), 0.0, q)
    # [places, p's list, q's list without p's, all others]
    p_all, q_all = _closed(np.hstack((p, p_of_q))), _closed(np.hstack((q_of_p, only_q)))
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p_all > 0, p_all * np.log(p_all / q_all), 0.0)
    return np.asarray(np.maximum(terms.sum(1), 0.0))


def _closed(listed: np.ndarray) -> np.ndarray:
    """Add a column for all other tokens, so that a row is a distribution."""
    others = np.maximum(1.0 - listed.sum(1, keepdims=True), SMALLEST)
    whole = np.hstack((listed, others))
    return np.asarray(whole / whole.sum(1, keepdims=True))
