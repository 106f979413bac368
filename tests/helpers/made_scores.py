"""Scores made for tests, and the call of an objective on them."""

import numpy as np

from megavar.config.schema import ObjectiveConfig
from megavar.objectives import get_objective
from megavar.records import Score, Weight


def score(index, policy, posterior, correct=1, answers=2, reference=(-0.5, -0.25), question="q"):
    policy, posterior = np.array(policy, np.float32), np.array(posterior, np.float32)
    return Score(question, index, 1, policy, posterior, np.array(reference, np.float32), answers, correct)


def random_scores(count, seed=5):
    rng = np.random.default_rng(seed)
    return [
        score(index, -rng.exponential(1, n), -rng.exponential(1, n), int(rng.integers(1, 5)), 5)
        for index, n in enumerate(rng.integers(1, 30, count))
    ]


def weigh(scores, truncated=None, name="iwae", **settings):
    return get_objective(name).weigh(scores, truncated or [False] * len(scores), ObjectiveConfig(**settings))


def rows(shares, question="q"):
    return [Weight(question, index, 1, 0.0, 0.0, 0.0, share, "ok") for index, share in enumerate(shares)]
