"""A small finished run, written by the real writers: records, weights of the real objective, manifest, metrics."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megavar.config.load import load_config
from megavar.data.decode import open_decoder
from megavar.record_files import write_records
from megavar.records import Answer, Question, Score, Trace
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest
from megavar.runs.metrics import Metrics
from megavar.runs.plan import find_stage
from megavar.stages.weigh import weigh_traces

BASE = Path(__file__).parents[2] / "examples" / "base" / "qwen3-tiny"
NUM_TRACES, NUM_ANSWERS = 4, 2
EVIL = '</script><script>console.error("escaped")</script><img src=x onerror=alert(1)>'
QUESTIONS = [
    Question("easy", "1+1", "2"),
    Question("mixed", f"2+2 & {EVIL}", "4"),
    Question("hard", "9*9", "1"),
    Question("cut", "3+3", "6"),
]
NUM_CORRECT = {"easy": (2, 2, 2, 2), "mixed": (0, 1, 2, 0), "hard": (0, 0, 0, 0), "cut": (1, 0, 0, None)}
"""Correct answers of each trace; None: the trace was truncated and has no answers."""


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def logps(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def round_records(number: int = 1) -> tuple[list[Trace], list[Answer], list[Score]]:
    traces, answers, scores = [], [], []
    for question in QUESTIONS:
        for index, correct in enumerate(NUM_CORRECT[question.id]):
            key, finish = (question.id, index, number), "length" if correct is None else "closed"
            trace_ids = ids(*range(16, 18 + index), 341)
            traces.append(Trace(*key, "posterior", ids(339, 279), trace_ids, None, finish, index))
            verdicts = [] if correct is None else [position < correct for position in range(NUM_ANSWERS)]
            answers += [
                Answer(question.id, index, position, number, ids(22), f"\\boxed{{{position}}}", "stop", position,
                       right, "correct" if right else "wrong")
                for position, right in enumerate(verdicts)
            ]  # fmt: skip
            size = len(trace_ids)
            counted = (len(verdicts) or None, sum(verdicts) if verdicts else None)
            says = (1, 2, 0.5, 0.5 + 0.1 * index) if index and correct is not None else ()  # its second token
            scores.append(
                Score(*key, logps(*[-0.5] * size), logps(*[-0.5 - 0.1 * index] * size), logps(-1, -2), *counted, *says)
            )
    return traces, answers, scores


def eval_answers(correct_of: dict[str, int], num_samples: int) -> list[Answer]:
    return [
        Answer(question_id, index, 0, 1, ids(22), "y", "stop", index, index < correct, "")
        for question_id, correct in correct_of.items()
        for index in range(num_samples)
    ]


ROUND_STAGES = ("sft", "posterior", "sample", "verify", "score", "weigh")


def make_run(folder: Path, name: str = "small", stages: tuple[str, ...] = (*ROUND_STAGES, "policy", "export")) -> Run:
    """A run with the named stages finished; records of a round if `weigh` is one of them."""
    questions = folder / "questions.jsonl"
    rows = [{"id": row.id, "question": row.question, "answer": row.answer} for row in QUESTIONS]
    questions.write_text("\n".join(map(json.dumps, rows)))
    (folder / "run.yaml").write_text(
        f"name: {name}\nruns_dir: {folder}/runs\nmodel: {BASE}\ndata: {{train: {questions}, eval: {questions}}}\n"
        f"sample: {{num_traces: {NUM_TRACES}, num_answers: {NUM_ANSWERS}}}\n"
        "eval: {num_samples: 3, num_bootstrap: 50}\nlogging: {tensorboard: false}\n"
    )
    run = Run(load_config(folder / "run.yaml", []))
    run.open()
    manifest, metrics = Manifest(run.folder), Metrics(run.folder, run.config.logging, name)
    for stage in stages:
        manifest.begin(stage, settings_of(run, stage))
        manifest.finish(stage, 1.0, [])
        if stage in ("sft", "posterior", "policy"):
            for step in range(1, 4):
                metrics.log(stage, step, {"loss": 1 / step, "grad_norm": 2 / step})
    if "weigh" in stages:
        write_round(run, 1)
    return run


def write_round(run: Run, number: int) -> None:
    """The records of a round, its entry in the manifest, and what weighing it logs."""
    folder = run.folder / f"round_{number:02d}"
    traces, answers, scores = round_records(number)
    write_records(folder / "traces" / "data.parquet", traces, Trace)
    write_records(folder / "verified" / "data.parquet", answers, Answer)
    write_records(folder / "scores" / "data.parquet", scores, Score)
    values = weigh_traces([(traces, scores)], "iwae", run.config.objective, folder / "weights")
    Metrics(run.folder, run.config.logging, run.config.name).log("weigh", number, values)
    run = replace(run, round_index=number)
    Manifest(run.folder).begin(run.entry("weigh"), settings_of(run, "weigh") if number == 1 else {})
    Manifest(run.folder).finish(run.entry("weigh"), 1.0, [])


def settings_of(run: Run, stage: str) -> dict[str, Any]:
    """What the manifest records of a stage of the first round."""
    return find_stage(run.config, stage)[0].settings(run)


def write_eval(run: Run, model: str, correct_of: dict[str, int]) -> None:
    answers = eval_answers(correct_of, run.config.eval.num_samples)
    write_records(run.folder / "eval" / model / "verified" / "data.parquet", answers, Answer)


def trace_text(index: int) -> str:
    """What the tokenizer makes of trace `index` of any question."""
    return open_decoder(BASE)(ids(*range(16, 18 + index), 341))
