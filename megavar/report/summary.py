"""The table a run ends with: accuracy before and after, what was sampled, how the weights spread, time a stage."""

import json
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from megavar.records import Answer, Trace, TraceFinish, atomic_write, read_records
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest
from megavar.runs.metrics import Metrics


def summarize(run: Run) -> dict[str, Any]:
    """The run's results up to this round as one JSON-able dictionary; traces are those of this round.

    Raises:
        ValueError: if the metrics of `weigh` are missing.
    """
    traces = read_records(run.round / "traces" / "data.parquet", Trace)
    answers = read_records(run.round / "verified" / "data.parquet", Answer)
    finishes = Counter(trace.finish for trace in traces)
    names = [f"pi_{index}" for index in range(run.round_index + 1)]
    models = {name: run.folder / "eval" / f"{name}.json" for name in names}
    weighed = {row["step"]: row for row in Metrics.read(run.folder) if row["stage"] == "weigh"}
    if run.round_index not in weighed:
        raise ValueError(
            f"{run.folder}/metrics.jsonl has no row of weigh in round {run.round_index}; restore it, or remove the "
            f"entry {run.entry('weigh')} of manifest.json and run that stage again."
        )
    weigh = weighed[run.round_index]
    return {
        "accuracy": {name: json.loads(file.read_text()) for name, file in models.items() if file.exists()},
        "ess": weigh["ess"],
        "num_traces": run.config.num_traces,
        "largest_engine_difference": weigh.get("largest_engine_difference"),
        "questions": int(weigh["questions"]),
        "questions_with_weight": int(weigh["questions_with_weight"]),
        "traces_sampled": len(traces),
        "traces_truncated": finishes[TraceFinish.LENGTH],
        "answers_sampled": len(answers),
        "answers_correct": sum(bool(answer.correct) for answer in answers),
        "seconds": {
            stage: entry["seconds"]
            for stage, entry in Manifest(run.folder).entries().items()
            if entry["status"] == "finished"
        },
    }


def summary_rows(found: dict[str, Any]) -> list[list[tuple[str, str]]]:
    """What `summarize` found as sections of (label, value)."""
    accuracy = [
        (f"pass@{row['k']} {'before' if name == 'pi_0' else 'after'} ({name})", f"{row['mean']:.3f}  {interval(row)}")
        for name, rows in found["accuracy"].items()
        for row in rows
    ]
    sampled = [
        ("questions with weight", f"{found['questions_with_weight']} of {found['questions']}"),
        ("traces sampled / truncated", f"{found['traces_sampled']} / {found['traces_truncated']}"),
        ("answers sampled / correct", f"{found['answers_sampled']} / {found['answers_correct']}"),
        ("effective sample size", f"{found['ess']:.2f} of {found['num_traces']} traces a question"),
    ]
    seconds = {**found["seconds"], "all stages": sum(found["seconds"].values())}
    return [accuracy, sampled, [(f"{stage}, seconds", f"{value:.0f}") for stage, value in seconds.items()]]


def interval(row: dict[str, float]) -> str:
    """A bootstrap interval in brackets."""
    return f"[{row['low']:.3f}, {row['high']:.3f}]"


def print_summary(run: Run) -> None:
    """Print the table and write it to report/summary.json."""
    found = summarize(run)
    file = run.folder / "report" / "summary.json"
    file.parent.mkdir(exist_ok=True)
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n")
    table = Table("", "", title=f"{run.config.name}: {run.folder}", show_header=False)
    for section in summary_rows(found):
        for row in section:
            table.add_row(*row)
        table.add_section()
    Console(width=None).print(table)
