"""The results of models on suites (`results.json`) as a table: in the terminal, and for the report."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megavar.evaluation.estimates import Estimate
from megavar.evaluation.results import Estimates, Results, SuiteResults, read_results

FILE = "results.json"
LOG_COLUMNS = 120
"""Width of a table that is not printed on a terminal."""
CAPTION = "Means over the questions with 95 % bootstrap intervals; tokens and share truncated are per sample."


def is_evaluation(folder: Path) -> bool:
    """Whether a folder is what `megavar eval --model ... --suite ...` wrote."""
    return (folder / FILE).is_file() and not (folder / "config.yaml").exists()


def metrics_of(results: Results) -> list[str]:
    """Of every model on every suite."""
    suite = next(iter(results.suites.values()))
    return list(next(iter(suite.models.values())))


def rows_of(suite: SuiteResults) -> list[list[str]]:
    """Model and metrics of each model, then of each pair of models: the later one's minus the earlier one's."""
    return [
        *([model, *_cells(values, "")] for model, values in suite.models.items()),
        *([f"{pair.model} − {pair.minus}", *_cells(pair.values, "+")] for pair in suite.differences),
    ]


def title_of(name: str, suite: SuiteResults) -> str:
    """Of a suite, with its size."""
    return f"{name}, {suite.questions} question{'s' if suite.questions != 1 else ''}"


def _cells(values: Estimates, sign: str) -> Sequence[str]:
    def cell(metric: str, found: Estimate) -> str:
        form = f"{sign}.0f" if metric == "tokens" else f"{sign}.3f"
        return f"{found.mean:{form}}\n[{found.low:{form}}, {found.high:{form}}]"

    return [cell(metric, found) for metric, found in values.items()]


def print_results(folder: Path) -> None:
    """Print the tables of an evaluation, or of a run's eval/, one for each suite."""
    results = read_results(folder / FILE)
    console = Console(width=None if sys.stdout.isatty() else LOG_COLUMNS)
    for name, suite in results.suites.items():
        table = Table("", *metrics_of(results), title=title_of(name, suite), title_justify="left", box=SIMPLE_HEAD)
        for row in rows_of(suite):
            table.add_row(*row)
        console.print(table)
    console.print(f"{folder / FILE}: {results.num_samples} samples a question. {CAPTION}", soft_wrap=True)
