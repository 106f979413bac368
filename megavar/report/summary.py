"""Summary table at the end of a run: accuracy before and after, sampling statistics, ESS, seconds per stage."""

import json
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from megavar.disk import atomic_write
from megavar.evaluation.pass_at_k import read_accuracies
from megavar.record_files import RecordFile
from megavar.records import Answer, Trace, TraceFinish
from megavar.report.suites import FILE, print_results
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest
from megavar.runs.metrics import Metrics

_LEAKAGE = ("answer_in_trace", "leakage", "leakage_posterior", "leakage_weighted", "traces_leaky", "leaky_weight")


def summarize(run: Run) -> dict[str, Any]:
    """Results of the run up to this round as a JSON-serialisable dictionary; sampling statistics are of this round.

    Raises:
        ValueError: if metrics.jsonl has no row of `weigh` for this round.
    """
    traces = RecordFile(run.round / "traces" / "data.parquet", Trace, ["finish"]).table()
    answers = RecordFile(run.round / "verified" / "data.parquet", Answer, ["correct"]).table()
    finishes = Counter(traces["finish"].to_pylist())
    names = [f"pi_{index}" for index in range(run.round_index + 1)]
    models = {name: run.eval / f"{name}.json" for name in names}
    weigh_rows = {row["step"]: row for row in Metrics.read(run.folder) if row["stage"] == "weigh"}
    needed = {"ess", "questions", "questions_with_weight"}
    if not weigh_rows.get(run.round_index, {}).keys() >= needed:
        raise ValueError(
            f"{run.folder}/metrics.jsonl has no complete row of stage weigh in round {run.round_index}; restore the "
            f"file, or remove the entry {run.entry('weigh')} from manifest.json and rerun the stage."
        )
    weigh = weigh_rows[run.round_index]
    finished = {
        stage: entry for stage, entry in Manifest(run.folder).entries().items() if entry["status"] == "finished"
    }
    return {
        "accuracy": {name: read_accuracies(file) for name, file in models.items() if file.exists()},
        "ess": weigh["ess"],
        "num_traces": run.config.num_traces,
        "largest_engine_difference": weigh.get("largest_engine_difference"),
        "log_ratio_noise": weigh.get("log_ratio_noise"),
        "weight_noise": weigh.get("weight_noise"),
        **{key: weigh.get(key) for key in _LEAKAGE},
        "questions": int(weigh["questions"]),
        "questions_with_weight": int(weigh["questions_with_weight"]),
        "traces_sampled": len(traces),
        "traces_truncated": finishes[TraceFinish.LENGTH],
        "answers_sampled": len(answers),
        "answers_correct": sum(map(bool, answers["correct"].to_pylist())),
        "seconds": {stage: entry["seconds"] for stage, entry in finished.items()},
        "reused_from": {stage: entry["reused_from"] for stage, entry in finished.items() if "reused_from" in entry},
    }


def summary_rows(summary: dict[str, Any]) -> list[list[tuple[str, str]]]:
    """Format the result of `summarize` as sections of (label, value)."""
    accuracy = [
        (f"pass@{row['k']} {'before' if name == 'pi_0' else 'after'} ({name})", f"{row['mean']:.3f}  {interval(row)}")
        for name, rows in summary["accuracy"].items()
        for row in rows
    ]
    sampled = [
        ("questions with weight", f"{summary['questions_with_weight']} of {summary['questions']}"),
        ("traces sampled / truncated", f"{summary['traces_sampled']} / {summary['traces_truncated']}"),
        ("answers sampled / correct", f"{summary['answers_sampled']} / {summary['answers_correct']}"),
        ("effective sample size", f"{summary['ess']:.2f} of {summary['num_traces']} traces per question"),
    ]
    if summary["weight_noise"] is not None:
        noise = f"±{summary['weight_noise']:.2g} of a weight, ±{summary['log_ratio_noise']:.2g} nats of a log-ratio"
        sampled.append(("noise of scoring", noise))
    if summary["leakage"] is not None:
        weighted = summary["leakage_weighted"]
        means = f"{summary['leakage']:.2f} nats" + ("" if weighted is None else f", by weight {weighted:.2f}")
        means += f" (under the sampler {summary['leakage_posterior']:.2f})"
        sampled.append(("leakage", f"{means}; {summary['answer_in_trace']:.0%} of the traces say the answer"))
    if summary["traces_leaky"] is not None:
        mass = f"{summary['leaky_weight'] or 0.0:.1%} of the weight"
        sampled.append(("traces left out as leaky", f"{summary['traces_leaky']:.0f}, {mass}"))
    seconds, reused = {**summary["seconds"], "all stages": sum(summary["seconds"].values())}, summary["reused_from"]
    timed = [
        (f"{stage}, seconds", f"{value:.0f}" + (f", reused from {reused[stage]}" if stage in reused else ""))
        for stage, value in seconds.items()
    ]
    return [accuracy, sampled, timed]


def interval(row: dict[str, float]) -> str:
    """Format a bootstrap interval: [low, high]."""
    return f"[{row['low']:.3f}, {row['high']:.3f}]"


def print_summary(run: Run) -> None:
    """Print the summary table and write the summary to report/summary.json."""
    summary = summarize(run)
    file = run.folder / "report" / "summary.json"
    file.parent.mkdir(exist_ok=True)
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
    table = Table("", "", title=f"{run.config.name}: {run.folder}", show_header=False)
    for section in summary_rows(summary):
        for row in section:
            table.add_row(*row)
        table.add_section()
    Console(width=None).print(table)
    if run.config.eval.suites and (run.eval / FILE).exists():
        print_results(run.eval)
