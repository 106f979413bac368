"""The table a run ends with: accuracy before and after, what was sampled, how the weights spread, time a stage."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megavar.records import Answer, Trace, read_records, write_aside
from megavar.stages.metrics import Metrics
from megavar.stages.run import Manifest, Run


def summarize(run: Run, round_folder: Path) -> dict[str, Any]:
    """The run's results, with those of one of its rounds, as one JSON-able dictionary."""
    traces = read_records(round_folder / "traces" / "data.parquet", Trace)
    answers = read_records(round_folder / "verified" / "data.parquet", Answer)
    rows = {row["stage"]: row for row in Metrics.read(run.folder)}
    finishes = Counter(trace.finish for trace in traces)
    models = {name: run.folder / "eval" / f"{name}.json" for name in ("pi_0", "final")}
    return {
        "accuracy": {name: json.loads(file.read_text()) for name, file in models.items() if file.exists()},
        "ess": rows["weigh"]["ess"],
        "num_traces": run.config.sample.num_traces,
        "largest_engine_difference": rows["weigh"].get("largest_engine_difference"),
        "questions": int(rows["weigh"]["questions"]),
        "questions_with_weight": int(rows["weigh"]["questions_with_weight"]),
        "traces_sampled": len(traces),
        "traces_truncated": finishes["length"],
        "answers_sampled": len(answers),
        "answers_correct": sum(bool(answer.correct) for answer in answers),
        "seconds": {stage: entry["seconds"] for stage, entry in Manifest(run.folder).entries().items()},
    }


def summary_rows(found: dict[str, Any]) -> list[list[tuple[str, str]]]:
    """What `summarize` found as sections of (label, value)."""
    accuracy = [
        (f"pass@{row['k']} {label}", f"{row['mean']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]")
        for name, label in (("pi_0", "before (pi_0)"), ("final", "after (final policy)"))
        for row in found["accuracy"].get(name, [])
    ]
    sampled = [
        ("questions with a correct trace", f"{found['questions_with_weight']} of {found['questions']}"),
        ("traces sampled / truncated", f"{found['traces_sampled']} / {found['traces_truncated']}"),
        ("answers sampled / correct", f"{found['answers_sampled']} / {found['answers_correct']}"),
        ("effective sample size", f"{found['ess']:.2f} of {found['num_traces']} traces a question"),
    ]
    seconds = {**found["seconds"], "all stages": sum(found["seconds"].values())}
    return [accuracy, sampled, [(f"{stage}, seconds", f"{value:.0f}") for stage, value in seconds.items()]]


def print_summary(run: Run) -> None:
    """Print the table and write it to report/summary.json."""
    found = summarize(run, run.round)
    file = run.folder / "report" / "summary.json"
    file.parent.mkdir(exist_ok=True)
    with write_aside(file) as aside:
        aside.write_text(json.dumps(found, indent=2) + "\n")
    table = Table("", "", title=f"{run.config.name}: {run.folder}", show_header=False)
    for section in summary_rows(found):
        for row in section:
            table.add_row(*row)
        table.add_section()
    Console(width=None).print(table)
