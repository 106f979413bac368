"""Benchmarks the data path of every stage at N, 4N and 16N questions, without the model: time, memory, bytes written.

    python tools/bench_scale.py --questions 1044 --traces 8 --answers 8 --tokens 3000 --steps 50

A synthetic run (random tokens and log-probs, real files) goes through the stages' own code; the place of the model's
forward is taken by random log-probs. Each stage runs in its own process. Memory is the most that is resident in
anonymous pages, less that after the imports; pages of mapped files, which the kernel shares and takes back, come extra
as "mapped". CPU is the process's own, and the kernel's for it. Exponents of growth are of the last step, from 4N to 16N
questions. Those of the kernel include how fast the machine hands out pages: a virtual one may be slow at pages that it
has not used lately.
"""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megavar.config.load import load_config
from megavar.joins import check_complete, identities
from megavar.record_files import RecordFile, RecordWriter, list_column
from megavar.records import Answer, Trace, schema_of
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest

ROOT = Path(__file__).parents[1]
BASE = ROOT / "examples" / "base" / "qwen3-tiny"
VOCAB_SIZE = 151_936
QUESTIONS_A_PART = 256
ANSWER_TOKENS = 24
RANKS = 8
"""Data-parallel ranks, one of which is measured."""


class PeakMemory:
    """Largest memory of this process inside `with`, in MiB, less that at its beginning."""

    def __enter__(self) -> "PeakMemory":
        self._start, self._ends = _memory(), threading.Event()
        self.private = self.mapped = 0.0
        self._watch = threading.Thread(target=self._look_on, daemon=True)
        self._watch.start()
        return self

    def _look_on(self) -> None:
        while not self._ends.wait(0.05):
            self._look()

    def _look(self) -> None:
        private, mapped = (now - before for now, before in zip(_memory(), self._start, strict=True))
        self.private, self.mapped = max(self.private, private), max(self.mapped, mapped)

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._watch.join()
        self._look()


def _memory() -> tuple[float, float]:
    """Resident MiB: anonymous pages, pages of files; by the kernel's counters, since smaps walks all pages."""
    sizes = dict(line.split()[:2] for line in Path("/proc/self/status").read_text().splitlines() if "kB" in line)
    return int(sizes["RssAnon:"]) / 1024, int(sizes["RssFile:"]) / 1024


# -- the synthetic run --


def make_run(folder: Path, questions: int, traces: int, answers: int, tokens: int) -> Run:
    """Configuration, question file, and the part files that sampling leaves."""
    ids = [f"q{index:07d}" for index in range(questions)]
    with (folder / "questions.jsonl").open("w") as file:
        for index, question_id in enumerate(ids):
            row = {"id": question_id, "question": f"{index}+{index}", "answer": str(2 * index), "trace": "7+3\n" * 40}
            file.write(json.dumps(row) + "\n")
    (folder / "run.yaml").write_text(
        f"name: scale\nruns_dir: {folder}/runs\nmodel: {BASE}\n"
        f"data: {{train: {folder}/questions.jsonl, max_sequence_tokens: 40000}}\n"
        f"sample: {{num_traces: {traces}, num_answers: {answers}}}\nlogging: {{tensorboard: false}}\n"
        "policy: {train: {batch_sequences: 512, microbatch_tokens: 40000}}\nscore: {microbatch_tokens: 40000}\n"
    )
    run = Run(load_config(folder / "run.yaml", []))
    run.open()
    for stage in ("sft", "posterior", "sample", "verify", "score", "weigh", "policy"):
        Manifest(run.folder).begin(stage, {"questions": questions})
    for model in (run.sft, run.posterior):
        model.mkdir(parents=True)
        (model / "hf").symlink_to(BASE)
    random = np.random.default_rng(0)
    ended = np.argsort(np.arange(questions) + random.uniform(0, QUESTIONS_A_PART, questions))  # nearly as asked
    for part, start in enumerate(range(0, questions, QUESTIONS_A_PART)):
        some = [ids[index] for index in sorted(ended[start : start + QUESTIONS_A_PART])]
        _write_part(run.round / "traces", part, _traces(random, some, traces, tokens))
        _write_part(run.round / "answers", part, _answers(random, some, traces, answers))
    return run


def _write_part(folder: Path, part: int, table: pa.Table) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"part-{part:06d}.parquet", compression="zstd", write_page_checksum=True)


def _lists(values: Any, lengths: Any) -> pa.Array:
    return list_column(values, np.concatenate([[0], np.cumsum(lengths)]))


def _traces(random: np.random.Generator, ids: Sequence[str], num_traces: int, tokens: int) -> pa.Table:
    count = len(ids) * num_traces
    lengths = random.integers(tokens // 2, tokens * 3 // 2, count)
    trace_ids = (random.random(lengths.sum(), np.float32) ** 3 * VOCAB_SIZE).astype(np.int32)
    columns = {
        "question_id": np.repeat(ids, num_traces),
        "trace_index": np.tile(np.arange(num_traces, dtype=np.int32), len(ids)),
        "round": np.ones(count, np.int32),
        "sampler": ["posterior"] * count,
        "prompt_ids": _lists(random.integers(0, VOCAB_SIZE, count * 100).astype(np.int32), np.full(count, 100)),
        "trace_ids": _lists(trace_ids, lengths),
        "logp_engine": pa.nulls(count, pa.list_(pa.float32())),
        "finish": random.choice(["closed", "length"], count, p=[0.95, 0.05]),
        "seed": np.arange(count),
    }
    return pa.table(columns, schema=schema_of(Trace))


def _answers(random: np.random.Generator, ids: Sequence[str], num_traces: int, num_answers: int) -> pa.Table:
    count = len(ids) * num_traces * num_answers
    truth = np.repeat([2 * int(question_id[1:]) for question_id in ids], num_traces * num_answers)
    values = np.where(random.random(count) < 0.5, truth, random.integers(0, 10**6, count))
    answer_ids = random.integers(0, VOCAB_SIZE, count * ANSWER_TOKENS).astype(np.int32)
    columns = {
        "question_id": np.repeat(ids, num_traces * num_answers),
        "trace_index": np.tile(np.repeat(np.arange(num_traces, dtype=np.int32), num_answers), len(ids)),
        "answer_index": np.tile(np.arange(num_answers, dtype=np.int32), len(ids) * num_traces),
        "round": np.ones(count, np.int32),
        "answer_ids": _lists(answer_ids, np.full(count, ANSWER_TOKENS)),
        "text": [f"So the answer is \\boxed{{{value}}}." for value in values],
        "finish": ["stop"] * count,
        "seed": np.arange(count),
        "correct": pa.nulls(count, pa.bool_()),
        "verdict": pa.nulls(count, pa.string()),
    }
    return pa.table(columns, schema=schema_of(Answer))


# -- the stages --


def merge_samples(run: Run, steps: int) -> None:
    """What sampling does besides asking: find what there is, and merge."""
    kinds: tuple[tuple[str, type[Any]], ...] = (("traces", Trace), ("answers", Answer))
    for name, record_type in kinds:
        writer: RecordWriter[Any] = RecordWriter(run.round / name, record_type, 5.0)
        writer.existing_identities()
        writer.finish()
        columns = [
            column
            for column in ("question_id", "trace_index", "answer_index")
            if column in schema_of(record_type).names
        ]
        file = RecordFile(run.round / name / "data.parquet", record_type, columns)
        check_complete(identities(file), identities(file), run.round / name)


def verify(run: Run, steps: int) -> None:
    """The parent's part; the workers' is not counted."""
    from megavar.stages import verify as stage

    stage.execute(run, None)  # type: ignore[arg-type]


def read_questions(run: Run, steps: int) -> None:
    """Questions, and their tokens, as every stage on rank 0 begins."""
    from megavar.stages.run_files import question_tokens

    tokens = question_tokens(run)
    for kind in ("policy_prompt", "posterior_prompt", "trace", "answer"):
        tokens.lengths(kind)


class WithoutModel:
    """In the place of a `Scorer`: reads and packs one rank's sequences, and gives random log-probs for all."""

    def __init__(self, *_: object) -> None:
        self._logps = -np.random.default_rng(1).exponential(1, 2**23).astype(np.float32)

    def score(self, sequences: Any, indices: Sequence[int], temperature: float, budget: int) -> dict[int, Any]:
        """As `Scorer.score`."""
        from megavar.packing import PackShape, pack, partition

        lengths = sequences.num_tokens[np.asarray(indices)].tolist()
        for places in partition(lengths, budget, RANKS)[0]:
            pack(sequences, [indices[place] for place in places], PackShape())
        sizes = sequences.num_targets[np.asarray(indices)].tolist()
        starts = np.cumsum(sizes) % (len(self._logps) - max(sizes))  # new ones would take as long as writing them
        return {
            index: self._logps[start : start + size]
            for index, start, size in zip(indices, starts.tolist(), sizes, strict=True)
        }

    def release(self) -> None:
        """Nothing to free."""


def score(run: Run, steps: int) -> None:
    """Sequences, packing, parts of a rank, and the merge."""
    from megavar.stages import score as stage
    from megavar.training import parallel

    vars(stage)["Scorer"] = WithoutModel
    parallel.start_alone()
    stage.execute(run, None)  # type: ignore[arg-type]
    parallel.stop()


def weigh(run: Run, steps: int) -> None:
    """All of it."""
    from megavar.stages import weigh as stage

    stage.execute(run, None)  # type: ignore[arg-type]


def write_training_set(run: Run, steps: int) -> None:
    """Rank 0 of the policy stage, up to the first step."""
    from megavar.stages import policy as stage
    from megavar.training.sequence_files import write_sequences

    write_sequences(run.policy / "sequences", "bench", stage._sequences(run))


def train_data(run: Run, steps: int) -> float:
    """Any rank of the policy stage: open the set, then order, partition and pack; returns the seconds of a step."""
    from megavar.packing import PackShape, data_order, pack, partition
    from megavar.training.loop import loss_normalizer
    from megavar.training.sequence_files import open_sequences

    sequences, train = open_sequences(run.policy / "sequences"), run.config.policy.train
    loss_normalizer(sequences, train)
    batch, seconds = train.batch_sequences, []
    for step in range(steps):
        began = time.perf_counter()
        indices = data_order(len(sequences), step * batch, (step + 1) * batch, 0)
        plan = partition(sequences.num_tokens[indices].tolist(), train.microbatch_tokens, RANKS)[step % RANKS]
        for places in plan:
            pack(sequences, [indices[place] for place in places], PackShape())
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:]))


STAGES: dict[str, Callable[[Run, int], float | None]] = {
    "questions": read_questions,
    "sample: merge": merge_samples,
    "verify: parent": verify,
    "score: data": score,
    "weigh": weigh,
    "policy: rank 0": write_training_set,
    "policy: a rank": train_data,
}


def run_stage(name: str, folder: Path, steps: int) -> None:
    """Run one stage in this process and print its measurements as JSON."""
    for module in ("policy", "score", "verify", "weigh"):  # which a job's process has before it begins
        importlib.import_module(f"megavar.stages.{module}")
    importlib.import_module("transformers.models.auto.tokenization_auto")
    run = Run(load_config(folder / "run.yaml", []))
    written = _bytes_written()
    began, before = time.perf_counter(), os.times()
    with PeakMemory() as memory:
        step_seconds = STAGES[name](run, steps)
    after = os.times()
    result = {
        "wall": time.perf_counter() - began,
        "user": after.user - before.user,
        "system": after.system - before.system,
        "mib": memory.private,
        "mapped": memory.mapped,
        "gb": (_bytes_written() - written) / 1e9,
        "step_ms": None if step_seconds is None else 1000 * step_seconds,
    }
    print("RESULT " + json.dumps(result))


def _bytes_written() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    raise OSError("/proc/self/io has no wchar")


def main() -> None:
    """Measure every stage at three sizes and print a table with the exponents of growth."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=250, metavar="N", help="of the smallest size (default: 250)")
    parser.add_argument("--traces", type=int, default=8, help="a question (default: 8)")
    parser.add_argument("--answers", type=int, default=8, help="a trace (default: 8)")
    parser.add_argument("--tokens", type=int, default=3000, help="of a trace, on average (default: 3000)")
    parser.add_argument("--steps", type=int, default=50, help="training steps whose data is packed (default: 50)")
    parser.add_argument("--folder", type=Path, help="for the files (default: the system's temporary folder)")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage is not None:
        run_stage(given.stage, given.folder, given.steps)
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in STAGES}
    for factor in (1, 4, 16):
        folder = Path(tempfile.mkdtemp(prefix="scale.", dir=given.folder))
        try:
            questions = given.questions * factor
            make_run(folder, questions, given.traces, given.answers, given.tokens)
            for name in STAGES:
                found[name].append(_measured(name, folder, given.steps))
                print(f"{questions:>9,} questions  {name:<16} {_described(found[name][-1])}", flush=True)
        finally:
            shutil.rmtree(folder)
    print(f"\nexponents from {given.questions * 4:,} to {given.questions * 16:,} questions")
    for name, (_, middle, last) in found.items():
        keys = [key for key in ("wall", "user", "system", "mib", "gb") if middle[key] > 0 and last[key] > 0]
        shown = {key: np.log(last[key] / middle[key]) / np.log(4) for key in keys}
        print(f"{name:<16} " + "  ".join(f"{key} {value:5.2f}" for key, value in shown.items()))
    wall, *cpu = (sum(rows[-1][key] for rows in found.values()) for key in ("wall", "user", "system"))
    print(f"whole round at the largest size: {wall:.0f} s; CPU {cpu[0]:.0f} s, and {cpu[1]:.0f} s in the kernel")


def _measured(name: str, folder: Path, steps: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--stage", name, "--folder", str(folder), "--steps", str(steps)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    measured: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return measured


def _described(row: dict[str, Any]) -> str:
    text = f"{row['wall']:7.1f} s, CPU {row['user']:6.1f} + {row['system']:5.1f} s, memory {row['mib']:5.0f} MiB, "
    text += f"mapped {row['mapped']:5.0f} MiB, written {row['gb']:6.2f} GB"
    return text if row["step_ms"] is None else f"{text}, {row['step_ms']:.2f} ms a step"


if __name__ == "__main__":
    main()
