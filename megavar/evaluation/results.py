"""The results of models on suites of questions: `results.json` (docs/evaluation.md#resultsjson)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from megavar.disk import atomic_write
from megavar.evaluation.estimates import Estimate, Floats, estimate
from megavar.evaluation.pass_at_k import pass_at_k

Estimates = dict[str, Estimate]
"""Metric -> its mean over the questions."""


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What one model did on the Q questions of a suite, each sampled n times; all [Q] float64."""

    num_correct: Floats
    majority: Floats
    """Probability that the answer given most often is correct (`majority.py`)."""
    tokens: Floats
    """Mean over the samples, of trace and answer."""
    truncated: Floats
    """Share of the samples of which trace or answer was cut at its limit."""


@dataclass(frozen=True)
class Difference:
    """Of two models on the same questions, paired."""

    model: str
    minus: str
    values: Estimates


@dataclass(frozen=True)
class SuiteResults:
    """Of all models on one suite."""

    file: str
    questions: int
    models: dict[str, Estimates]
    differences: list[Difference]


@dataclass(frozen=True)
class Results:
    """Contents of results.json."""

    num_samples: int
    num_bootstrap: int
    seed: int
    """Of the bootstrap."""
    models: dict[str, str]
    """Name -> folder."""
    suites: dict[str, SuiteResults]


def compare(
    file: str, outcomes_of: Mapping[str, Outcomes], num_samples: int, ks: Sequence[int], num_bootstrap: int, seed: int
) -> SuiteResults:
    """Estimate every metric of every model, and the difference of each model and each one before it.

    Args:
        outcomes_of: by model; questions in the same order.
        num_samples: n.
        ks: the k of each pass@k.
        num_bootstrap, seed: see `estimate`.
    """
    values_of = {model: _values(outcomes, num_samples, ks) for model, outcomes in outcomes_of.items()}

    def estimates(values: Mapping[str, Floats]) -> Estimates:
        return {metric: estimate(value, num_bootstrap, seed) for metric, value in values.items()}

    differences = [
        Difference(second, first, estimates({name: value - values_of[first][name] for name, value in values.items()}))
        for (first, _), (second, values) in combinations(values_of.items(), 2)
    ]
    num_questions = len(next(iter(outcomes_of.values())).num_correct)
    return SuiteResults(
        file, num_questions, {model: estimates(values) for model, values in values_of.items()}, differences
    )


def _values(outcomes: Outcomes, num_samples: int, ks: Sequence[int]) -> dict[str, Floats]:
    """Metric -> [Q] its value on each question."""
    passed = {k: np.array([pass_at_k(num_samples, int(c), k) for c in outcomes.num_correct]) for k in ks}
    return {
        f"avg@{num_samples}": outcomes.num_correct / num_samples,
        **{f"pass@{k}": values for k, values in passed.items()},
        f"maj@{num_samples}": outcomes.majority,
        "tokens": outcomes.tokens,
        "truncated": outcomes.truncated,
    }


def write_results(results: Results, file: Path) -> None:
    """Replace the file."""
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(asdict(results), indent=2) + "\n", encoding="utf-8")


def read_results(file: Path) -> Results:
    """What `write_results` wrote.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return Results(**{**found, "suites": {name: _suite(row) for name, row in found["suites"].items()}})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}); remove it and run the same evaluation again."
        ) from error


def _suite(row: dict[str, Any]) -> SuiteResults:
    models = {model: _estimates(values) for model, values in row["models"].items()}
    differences = [Difference(**{**pair, "values": _estimates(pair["values"])}) for pair in row["differences"]]
    return SuiteResults(**{**row, "models": models, "differences": differences})


def _estimates(values: dict[str, Any]) -> Estimates:
    return {metric: Estimate(**{name: float(number) for name, number in row.items()}) for metric, row in values.items()}
