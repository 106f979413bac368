"""Accuracy on held-out questions: pass@1 and pass@k with bootstrap intervals."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path

import numpy as np

from megavar.config.schema import EvalConfig
from megavar.joins import count_correct
from megavar.records import Answer, Question, write_aside


@dataclass(frozen=True)
class Accuracy:
    """Mean over the questions, with a 95 % bootstrap interval over questions."""

    k: int
    mean: float
    low: float
    high: float


def evaluate_model(
    questions: Sequence[Question], answers: Sequence[Answer], config: EvalConfig, seed: int, file: Path
) -> list[Accuracy]:
    """pass@1 and pass@num_samples of verified answers, written to `file` as JSON too."""
    found = [
        accuracy(questions, answers, config.num_samples, k, config.num_bootstrap, seed)
        for k in sorted({1, config.num_samples})
    ]
    with write_aside(file) as aside:
        aside.write_text(json.dumps([asdict(item) for item in found], indent=2) + "\n")
    return found


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that one of k samples is correct: 1 - C(n - c, k) / C(n, k)."""
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def accuracy(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    num_samples: int,
    k: int,
    num_bootstrap: int,
    seed: int,
) -> Accuracy:
    """pass@k of a model that was sampled `num_samples` times a question.

    Args:
        answers: verified; a sample whose trace was truncated has none, and counts as wrong.
    """
    answers_of: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        answers_of[answer.question_id].append(answer)
    rates = np.array([pass_at_k(num_samples, count_correct(answers_of[question.id]), k) for question in questions])
    random = np.random.default_rng(seed)
    means = rates[random.integers(0, len(rates), (num_bootstrap, len(rates)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Accuracy(k, float(rates.mean()), float(low), float(high))
