"""A logistic regression for each layer and block: how often it tells the key from the pooled state."""

from collections.abc import Iterator

import numpy
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

HELD_OUT = 0.25  # of the samples: what the accuracy is measured on


def accuracies(states: torch.Tensor, labels: torch.Tensor, seed: int = 0) -> Iterator[list[float]]:
    """For each layer the accuracy on held-out samples, 0 to 1, by block.

    states: float32 [layers, blocks, samples, width]; labels: int64 [samples].
    """
    train, test = train_test_split(
        numpy.arange(len(labels)), test_size=HELD_OUT, stratify=labels.numpy(), random_state=seed
    )
    with Parallel(n_jobs=-1) as parallel:
        for layer in states:
            yield parallel(delayed(accuracy)(block.numpy(), labels.numpy(), train, test) for block in layer)


def accuracy(
    states: NDArray[numpy.float32],
    labels: NDArray[numpy.int64],
    train: NDArray[numpy.int64],
    test: NDArray[numpy.int64],
) -> float:
    """Of a regression on the samples ``train``, over those of ``test``. states: [samples, width]; labels: [samples]."""
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    return float(regression.fit(states[train], labels[train]).score(states[test], labels[test]))
