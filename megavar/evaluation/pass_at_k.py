"""Held-out accuracy: pass@1 and pass@k with bootstrap confidence intervals."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from megavar.config.schema import EvalConfig
from megavar.disk import atomic_write
from megavar.evaluation.estimates import estimate
from megavar.joins import count_correct
from megavar.records import Answer, Question


@dataclass(frozen=True)
class Accuracy:
    """pass@k: mean over the questions and its 95 % bootstrap interval [low, high] over questions, as fractions."""

    k: int
    mean: float
    low: float
    high: float


def evaluate_model(
    questions: Sequence[Question], answers: Sequence[Answer], config: EvalConfig, seed: int, file: Path
) -> list[Accuracy]:
    """Compute pass@1 and pass@num_samples of verified answers and write them to `file` as JSON.

    Args:
        answers: see `accuracy`.
        seed: of the bootstrap.
        file: a list of `Accuracy` objects; replaced atomically.

    Raises:
        ValueError: naming an answer without a verdict.
    """
    accuracies = [
        accuracy(questions, answers, config.num_samples, k, config.num_bootstrap, seed)
        for k in sorted({1, config.num_samples})
    ]
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps([asdict(item) for item in accuracies], indent=2) + "\n")
    return accuracies


def read_accuracies(file: Path) -> list[dict[str, Any]]:
    """What `evaluate_model` wrote: an object for each k.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        for row in rows:
            Accuracy(**{key: value + 0 for key, value in row.items()})
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove it and run the stage eval again.") from error
    return rows


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is correct: 1 - C(n - c, k) / C(n, k)."""
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def accuracy(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    num_samples: int,
    k: int,
    num_bootstrap: int,
    seed: int,
) -> Accuracy:
    """pass@k from `num_samples` samples per question.

    Args:
        answers: verified, of all questions. A sample with a truncated trace has no answer and counts as wrong.
        num_bootstrap: bootstrap resamples of the questions.
        seed: of the bootstrap.

    Raises:
        ValueError: naming an answer without a verdict.
    """
    answers_of: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        answers_of[answer.question_id].append(answer)
    rates = np.array([pass_at_k(num_samples, count_correct(answers_of[question.id]), k) for question in questions])
    return Accuracy(k, **asdict(estimate(rates, num_bootstrap, seed)))
