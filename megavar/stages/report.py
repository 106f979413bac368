"""The table a run ends with: accuracy before and after, what was sampled, how the weights spread, time a stage."""

import json
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from megavar.records import Answer, Trace, read_records, write_aside
from megavar.stages.metrics import Metrics
from megavar.stages.run import Manifest, Run


def summarize(run: Run) -> dict[str, Any]:
    """The run's results up to this round as one JSON-able dictionary; traces are those of this round."""
    traces = read_records(run.round / "traces" / "data.parquet", Trace)
    answers = read_records(run.round / "verified" / "data.parquet", Answer)
    rows = {row["stage"]: row for row in Metrics.read(run.folder)}
    finishes = Counter(trace.finish for trace in traces)
    names = [f"pi_{index}" for index in range(run.round_index + 1)]
    models = {name: run.folder / "eval" / f"{name}.json" for name in names}
    weigh = rows[run.entry("weigh")]
    return {
        "accuracy": {name: json.loads(file.read_text()) for name, file in models.items() if file.exists()},
        "ess": weigh["ess"],
        "num_traces": run.config.sample.num_traces,
        "largest_engine_difference": weigh.get("largest_engine_difference"),
        "questions": int(weigh["questions"]),
        "questions_with_weight": int(weigh["questions_with_weight"]),
        "traces_sampled": len(traces),
        "traces_truncated": finishes["length"],
        "answers_sampled": len(answers),
        "answers_correct": sum(bool(answer.correct) for answer in answers),
        "seconds": {stage: entry["seconds"] for stage, entry in Manifest(run.folder).entries().items()},
    }


def print_summary(run: Run) -> None:
    """Print the table and write it to report/summary.json."""
    found = summarize(run)
    file = run.folder / "report" / "summary.json"
    file.parent.mkdir(exist_ok=True)
    with write_aside(file) as aside:
        aside.write_text(json.dumps(found, indent=2) + "\n")
    table = Table("", "", title=f"{run.config.name}: {run.folder}", show_header=False)
    last = f"pi_{run.round_index}"
    for name, rows in found["accuracy"].items():
        label = {"pi_0": "before (pi_0)", last: f"after ({last})"}.get(name, name)
        for row in rows:
            value = f"{row['mean']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]"
            table.add_row(f"pass@{row['k']} {label}", value)
    table.add_section()
    table.add_row("questions with a correct trace", f"{found['questions_with_weight']} of {found['questions']}")
    table.add_row("traces sampled / truncated", f"{found['traces_sampled']} / {found['traces_truncated']}")
    table.add_row("answers sampled / correct", f"{found['answers_sampled']} / {found['answers_correct']}")
    table.add_row("effective sample size", f"{found['ess']:.2f} of {found['num_traces']} traces a question")
    table.add_section()
    for stage, seconds in found["seconds"].items():
        table.add_row(f"{stage}, seconds", f"{seconds:.0f}")
    table.add_row("all stages, seconds", f"{sum(found['seconds'].values()):.0f}")
    Console(width=None).print(table)
