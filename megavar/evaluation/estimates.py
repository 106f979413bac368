"""Means over questions with 95 % intervals, by the percentile bootstrap over questions.

What one model does on a suite is an array with one value a question for each metric. Two models answer the same
questions, so their difference is the mean of the differences, question by question.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its 95 % interval [low, high]."""

    mean: float
    low: float
    high: float


def estimate(values: Floats, num_bootstrap: int, seed: int) -> Estimate:
    """The mean of values and its interval.

    Args:
        values: [Q], one a question.
        num_bootstrap: resamples of the questions.
        seed: of the resamples; equal for all metrics and models, which are then resampled alike.
    """
    random = np.random.default_rng(seed)
    means = values[random.integers(0, len(values), (num_bootstrap, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))
