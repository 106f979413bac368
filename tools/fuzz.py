"""Feeds mutated inputs to everything that reads what users give, and counts what it should never see.

    python tools/fuzz.py --inputs 1000 --seed 1

Each kind of input starts from a sound one and is changed at random: by structure (a key dropped, doubled, renamed, of
another type or an extreme value) or by bytes (flipped, cut, inserted, exchanged). A reader may accept the input or
refuse it with a ValueError or an ExplainedFailure of one line. It must not raise anything else (a traceback for the
user), leave half an output behind, or take longer than a minute. The table counts that by kind; the exit code is 1 if
there is any. `--kind KIND --index N` repeats one input in this process.
"""

import argparse
import asyncio
import io
import json
import multiprocessing
import pickle
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from aiohttp import web
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from megavar.checkpoints.convert import Model, to_hugging_face, to_megatron
from megavar.checkpoints.safe_pickle import check_pickles
from megavar.config.load import load_config
from megavar.ranks import ExplainedFailure
from megavar.record_files import RecordWriter, read_records, write_records
from megavar.records import Answer, Score, Trace
from megavar.report.run_view import open_run
from megavar.report.show import show
from megavar.report.summary import summarize
from megavar.rollout.engine import GenerateRequest
from megavar.rollout.sglang_client import SGLangEngine
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest
from megavar.runs.metrics import Metrics
from megavar.stages.check import check_run
from megavar.stages.weigh import weigh_traces

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "examples" / "base" / "qwen3-tiny"
LIMIT_SECONDS = 60.0
NUM_WORKERS = 2
EXTREMES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.5, 1e308, float("nan"), float("inf"), "", " ", "x",
    "\0", "\ud800", "a\nb", "é", "{", "{question}", "{0}", "../../x", "/", "1e9", "null", [], [1], [[]], {}, {"a": 1},
    "x" * 100_000,
]  # fmt: skip
ODD_LINES = (
    "name: b", "seed: 1", "sft: 3", "a: &a [*a]", "seed: ${seed}", "seed: ${oc.env:HOME}", "include: [run.yaml]",
    "include: 3", "include: [none.yaml]", "? [1]: 2", "!!python/object:os.x", "seed: 1_0", "rollout: null", "data:",
    "- x", "a: " + "[" * 3000, "\t",
)  # fmt: skip
KEYS = (
    "seed", "sft.learning_rate", "data.train", "model", "name", "rounds", "sample", "objective.name", "rollout.urls",
    "templates.policy", "verify.plugins", "runs_dir", "eval.models", "logging.level", "parallel.tensor", "x.y",
)  # fmt: skip
RUN = """
name: a
runs_dir: {folder}/runs
model: {folder}/model
data: {{train: {folder}/{questions}, max_sequence_tokens: 160}}
precision: {{recipe: fp32}}
sft: &train {{num_steps: 2, batch_sequences: 2}}
posterior: {{train: *train}}
policy: {{train: {{<<: *train, epochs: 2}}}}
sample: {{num_traces: 2, num_answers: 1, max_trace_tokens: 64, max_answer_tokens: 16}}
rollout: {{mode: external, urls: ["http://127.0.0.1:9"]}}
logging: {{tensorboard: false}}
"""


# -- mutations --


def change_value(value: Any, random: Random) -> Any:
    """Change one place of a JSON-like value."""
    places = list(_places(value))
    if not places or random.random() < 0.05:
        return random.choice(EXTREMES)
    holder, key = random.choice(places)
    how = random.choice(("extreme", "drop", "retype", "rename", "double"))
    if how == "extreme" or (how == "rename" and not isinstance(holder, dict)):
        holder[key] = random.choice(EXTREMES)
    elif how == "drop":
        del holder[key]
    elif how == "retype":
        old = holder[key]
        holder[key] = random.choice((str(old), [old], {"x": old}, len(str(old))))
    elif how == "rename":
        holder[str(key) + random.choice(("x", " ", "\0", "é"))] = holder.pop(key)
    elif isinstance(holder, list):
        holder.insert(key, holder[key])
    else:
        holder[str(key) + "_"] = holder[key]
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def change_bytes(data: bytes, random: Random) -> bytes:
    """Change a few bytes, or the length."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 3, 20))):
        at = random.randrange(len(changed) + 1)
        how = random.choice(("flip", "cut", "insert", "exchange", "repeat"))
        if how == "flip" and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif how == "cut":
            del changed[at : at + random.choice((1, 2, 7, 100, len(changed)))]
        elif how == "insert":
            changed[at:at] = random.choice((b"\0", b"\xff", b"{", b'"', b"\n", b": ", random.randbytes(9)))
        elif how == "exchange":
            changed[at:at] = changed[-at:]
        else:
            changed[at:at] = changed[at : at + 50]
        if len(changed) > 2 * len(data) + 1000:
            break
    return bytes(changed)


def change_file(file: Path, random: Random) -> None:
    """Change a file by structure, if it is JSON, or by bytes."""
    if file.suffix in (".json", ".jsonl") and random.random() < 0.7:
        rows = [
            json.loads(line)
            for line in (file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()])
        ]
        at = random.randrange(len(rows))
        rows[at] = change_value(rows[at], random)
        file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8", errors="surrogatepass")
    else:
        file.write_bytes(change_bytes(file.read_bytes(), random))


# -- kinds of input --

Call = Callable[[], object]
"""Gives the mutated input to what reads it."""


@dataclass(frozen=True)
class Kind:
    """One kind of input."""

    change: Callable[[Path, Random], Call]
    """Change the sound input in a folder, and return what reads it."""
    outputs: tuple[str, ...] = ()
    """Paths in the folder that must be complete or absent afterwards; a failed call leaves none."""


def make_sound(folder: Path) -> None:
    """Write the inputs that all kinds start from: questions, a model, a checkpoint, a run with a finished round."""
    shutil.copytree(BASE, folder / "model")
    rows = [{"id": f"q{n}", "question": f"{n}+1", "answer": str(n + 1), "trace": f"{n}+1\n{n + 1}\n"} for n in range(3)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    (folder / "run.yaml").write_text(RUN.format(folder=folder, questions="train.jsonl"))
    to_megatron(folder / "model", folder / "checkpoint", None, True)
    run = Run(load_config(folder / "run.yaml", []))
    run.open()
    ids = np.arange(20, 24, dtype=np.int32)
    logps = np.full(4, -0.5, np.float32)
    keys = [(f"q{n}", k, 1) for n in range(3) for k in range(2)]
    traces = [Trace(*key, "posterior", ids, ids, logps, "closed", 7) for key in keys]  # type: ignore[arg-type]
    answers = [Answer(*key[:2], 0, 1, ids, "\\boxed{1}", "stop", 7, True, "correct") for key in keys]  # type: ignore[arg-type]
    scores = [Score(*key, logps, logps - 0.1, logps, 1, 1) for key in keys]
    write_records(run.round / "traces" / "data.parquet", traces, Trace)
    writer = RecordWriter(run.round / "verified", Answer, 0.0)
    writer.append(*answers[:3])
    writer.append(*answers[3:])
    shutil.copytree(run.round / "verified", run.round / "parts")
    writer.finish()
    write_records(run.round / "scores" / "data.parquet", scores, Score)
    metrics = Metrics(run.folder, run.config.logging, "a")
    metrics.log("weigh", 1, weigh_traces([(traces, scores)], "iwae", run.config.objective, run.round / "weights"))
    for stage in ("sft", "posterior", "sample", "verify", "score", "weigh"):
        Manifest(run.folder).begin(stage, {"seed": 1})
        Manifest(run.folder).finish(stage, 1.0, [])


def _check(folder: Path, *overrides: str) -> Call:
    return lambda: check_run(load_config(folder / "run.yaml", list(overrides)), 1)


def questions_jsonl(folder: Path, random: Random) -> Call:
    """Question files in JSONL."""
    change_file(folder / "train.jsonl", random)
    return _check(folder)


def questions_parquet(folder: Path, random: Random) -> Call:
    """Question files in Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = folder / "train.parquet"
    if random.random() < 0.5:
        columns = pq.read_table(file).to_pydict()
        name = random.choice(list(columns))
        odd: list[Any] = [
            [None] * 3,
            [1, 2, 3],
            [b"a", b"\xff", b"c"],
            [["a"], ["b"], []],
            [{"a": 1}] * 3,
            [1.5, 2.0, None],
        ]
        columns[name if random.random() < 0.7 else name + "x"] = random.choice(odd)
        table = pa.table(columns)
        pq.write_table(table.slice(0, random.choice((0, 1, 3))), file)
    else:
        file.write_bytes(change_bytes(file.read_bytes(), random))
    return _check(folder, f"data.train={file}")


def configuration(folder: Path, random: Random) -> Call:
    """Configuration files."""
    file = folder / "run.yaml"
    if random.random() < 0.3:
        line = random.choice(ODD_LINES)
        file.write_text(file.read_text() + line + "\n")
    else:
        file.write_bytes(change_bytes(file.read_bytes(), random))
    return _check(folder)


def overrides(folder: Path, random: Random) -> Call:
    """`key=value` arguments."""
    key = random.choice(KEYS)
    item = f"{key}={random.choice(EXTREMES)}" if random.random() < 0.6 else f"{key}=1"
    if random.random() < 0.4:
        item = change_bytes(item.encode("utf-8", "surrogatepass"), random).decode("utf-8", "surrogateescape")
    return _check(folder, item)


def model_folder(folder: Path, random: Random) -> Call:
    """Hugging Face folders."""
    change_file(random.choice(sorted((folder / "model").iterdir())), random)

    def read() -> None:
        to_megatron(folder / "model", folder / "converted", None, False)
        _check(folder)()

    return read


def checkpoint(folder: Path, random: Random) -> Call:
    """Megatron checkpoints."""
    source = folder / "checkpoint"
    file = random.choice(sorted(path for path in source.rglob("*") if path.is_file()))
    if file.name == ".metadata" and random.random() < 0.6:
        metadata = pickle.loads(file.read_bytes())  # our own
        entry = random.choice(list(metadata.state_dict_metadata))
        how = random.choice(("drop", "size", "stored", "type", "chunks"))
        if how == "drop":
            del metadata.state_dict_metadata[entry]
        elif how == "type":
            metadata.state_dict_metadata[entry] = random.choice(EXTREMES)
        elif how == "stored":
            stored = random.choice(list(metadata.storage_data.values()))
            setattr(stored, random.choice(("relative_path", "offset", "length")), random.choice(EXTREMES))
        else:
            place = "size" if how == "size" else "chunks"
            setattr(metadata.state_dict_metadata[entry], place, random.choice([*EXTREMES, [1, 2], (3,)]))
        file.write_bytes(pickle.dumps(metadata))
    else:
        change_file(file, random)
    if random.random() < 0.9 and file.name != "SHA256SUMS":
        (source / "SHA256SUMS").unlink()

    def read() -> None:
        Model(source)
        check_pickles(source)
        to_hugging_face(source, folder / "converted", None, 10**6, False)

    return read


def records(folder: Path, random: Random) -> Call:
    """Files of a run."""
    run = folder / "runs" / "a"
    files = sorted(path for path in run.rglob("*") if path.is_file())
    file = random.choice([*files, run / "manifest.json", run / "metrics.jsonl", run / "config.yaml"])
    change_file(file, random)

    def read() -> None:
        list(RecordWriter(run / "round_01" / "parts", Answer, 1.0).existing())
        read_records(run / "round_01" / "scores" / "data.parquet", Score)
        view = open_run(run)
        view.last_round(), view.metrics, view.unfinished()
        summarize(view.run)
        if file.suffix == ".parquet" and file.exists():
            show(file, 2, None, None, Console(file=io.StringIO()))

    return read


def replies(folder: Path, random: Random) -> Call:
    """Answers of an SGLang server, by a server that sends them."""
    sample = {
        "text": "ab", "output_ids": [40, 41],
        "meta_info": {"weight_version": "default", "finish_reason": {"type": "stop", "matched": 41},
                      "output_token_logprobs": [[-0.5, 40, None], [-0.25, 41, None]]},
    }  # fmt: skip
    answers: dict[str, Any] = {
        "/model_info": {"model_path": str(BASE), "weight_version": "default"},
        "/server_info": {"enable_deterministic_inference": True, "disable_radix_cache": False},
        "/generate": [sample, json.loads(json.dumps(sample))],
    }
    where = random.choice(("/generate", "/generate", "/generate", "/model_info", "/server_info"))
    how = random.choice(("value", "value", "value", "bytes", "status", "cut"))
    body = json.dumps(change_value(answers[where], random) if how == "value" else answers[where]).encode(
        "utf-8", "replace"
    )
    if how == "bytes":
        body = change_bytes(body, random)
    status = random.choice((400, 401, 404, 429, 500, 503, 204, 302)) if how == "status" else 200

    async def handle(request: web.Request) -> web.StreamResponse:
        sent = await request.json() if request.can_read_body else {}
        if request.path == "/generate" and "logit_bias" in str(sent):  # the question after the vocabulary
            known = str(json.loads((BASE / "config.json").read_text())["vocab_size"]) not in str(sent)
            return web.json_response(
                {} if known else {"error": {"message": "out of vocabulary"}}, status=200 if known else 400
            )
        if request.path != where:
            return web.json_response(answers[request.path])
        if how == "cut":
            response = web.StreamResponse(headers={"Content-Length": str(len(body))})
            await response.prepare(request)
            await response.write(body[: len(body) // 2])
            assert request.transport is not None
            request.transport.close()
            return response
        return web.Response(body=body, status=status, content_type="application/json")

    async def read() -> None:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        options: dict[str, Any] = {
            "concurrency": 4,
            "request_timeout_seconds": 5.0,
            "max_retries": 0,
            "deterministic": True,
        }
        try:
            async with SGLangEngine([url], **options) as engine:
                await engine.check_model(BASE)
                request = GenerateRequest([1, 2], max_tokens=4, temperature=1.0, num_samples=2)
                for generation in await engine.generate(request):
                    assert 0 < len(generation.ids) <= 4 and generation.logps is not None, generation
                    assert np.isfinite(generation.logps).all() and (generation.logps <= 1e-3).all(), generation
                    assert generation.ids.min() >= 0 and isinstance(generation.text, str), generation
        finally:
            await runner.cleanup()

    return lambda: asyncio.run(read())


KINDS = {
    "questions_jsonl": Kind(questions_jsonl),
    "questions_parquet": Kind(questions_parquet),
    "configuration": Kind(configuration),
    "overrides": Kind(overrides),
    "model_folder": Kind(model_folder, ("converted",)),
    "checkpoint": Kind(checkpoint, ("converted",)),
    "records": Kind(records),
    "replies": Kind(replies),
}


# -- running them --


def is_short(message: str) -> bool:
    """Whether a message is one line, or a list of at most ten rows of a question file with their number."""
    first, *rows = message.splitlines() or [""]
    listed = [row for row in rows[:-1] if re.match(r"  line \d+: ", row)]
    is_list = len(listed) == len(rows) - 1 < 10 and re.match(r"\d+ of \d+ rows are bad: ", rows[-1]) is not None
    return bool(first) and len(message) <= 5000 and (not rows or is_list)


def try_one(kind: str, seed: int, index: int, sound: Path) -> tuple[str, str]:
    """Outcome of one input (`accepted`, `refused`, `traceback` or `half`), and what it raised or left."""
    with tempfile.TemporaryDirectory(prefix="megavar-fuzz-") as temporary:
        folder = Path(temporary)
        shutil.copytree(sound, folder, dirs_exist_ok=True)
        for file in (folder / "run.yaml", folder / "runs" / "a" / "config.yaml"):
            file.write_text(file.read_text().replace(str(sound), str(folder)))
        call = KINDS[kind].change(folder, Random(f"{seed}/{kind}/{index}"))
        try:
            call()
            outcome, said = "accepted", ""
        except (ValueError, ExplainedFailure) as error:
            outcome, said = "refused", str(error)
            if isinstance(error, UnicodeError | json.JSONDecodeError) or not is_short(said):
                outcome, said = "traceback", "".join(traceback.format_exception(error))
        except BaseException as error:
            return "traceback", "".join(traceback.format_exception(error))
        names = KINDS[kind].outputs
        aside = [path.name for name in names for path in folder.glob(f".{name}.*")]
        there = [name for name in names if (folder / name).exists()]
        if aside or (outcome == "refused" and kind == "checkpoint" and there):
            return "half", f"{aside + there} after: {said}"
        return outcome, said


def work(connection: Connection, seed: int, sound: Path) -> None:
    """Try inputs until the connection closes; in a process of its own."""
    import logging
    import warnings

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr = io.StringIO()
    vars(sys.modules["__main__"]).pop("__file__", None)  # else the verifiers' workers would import this script
    while True:
        try:
            kind, index = connection.recv()
        except EOFError:
            return
        connection.send(try_one(kind, seed, index, sound))


@dataclass
class Worker:
    """A process that tries inputs, and the one it has."""

    process: Any
    connection: Connection
    job: tuple[str, int] | None = None
    deadline: float = field(default=float("inf"))


def start_worker(seed: int, sound: Path) -> Worker:
    """Fork one: what this process has imported need not be imported again."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, seed, sound))
    process.start()
    theirs.close()
    return Worker(process, ours)


def run_all(jobs: list[tuple[str, int]], seed: int, sound: Path) -> Iterator[tuple[str, int, str, str]]:
    """Try all inputs; yields kind, index, outcome and what was raised. A process that hangs or dies is replaced."""
    pending = list(reversed(jobs))
    workers = [start_worker(seed, sound) for _ in range(min(NUM_WORKERS, len(jobs)))]
    while pending or any(worker.job for worker in workers):
        for worker in workers:
            if worker.job is None and pending:
                worker.job, worker.deadline = pending.pop(), time.monotonic() + LIMIT_SECONDS
                worker.connection.send(worker.job)
        wait([worker.connection for worker in workers], timeout=1.0)
        for number, worker in enumerate(workers):
            if worker.job is None:
                continue
            result: tuple[str, str] | None = None
            if worker.connection.poll():
                try:
                    result = worker.connection.recv()
                except EOFError:
                    result = ("traceback", "the process died")
            elif time.monotonic() > worker.deadline:
                result = ("hang", "")
            if result is not None:
                yield (*worker.job, *result)
                worker.job = None
                if result[0] == "hang" or result[1] == "the process died":
                    worker.process.kill()
                    workers[number] = start_worker(seed, sound)
    for worker in workers:
        worker.process.kill()


def main() -> int:
    """Read the arguments, try the inputs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000, help="number of inputs, spread over the kinds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, action="append", help="this kind only (repeatable)")
    parser.add_argument("--index", type=int, help="repeat this input of the kind, in this process")
    parser.add_argument("--show", type=int, default=5, metavar="N", help="failures of each kind that are printed")
    chosen = parser.parse_args()
    kinds = chosen.kind or list(KINDS)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="megavar-fuzz-sound-") as temporary:
        sound = Path(temporary)
        # In another process: a process whose torch has started threads cannot be forked.
        making = multiprocessing.get_context("fork").Process(target=make_sound, args=(sound,))
        making.start()
        making.join()
        if making.exitcode:
            return 1
        if chosen.index is not None:
            for kind in kinds:
                print(*try_one(kind, chosen.seed, chosen.index, sound), sep="\n")
            return 0
        jobs = [(kinds[number % len(kinds)], number // len(kinds)) for number in range(chosen.inputs)]
        counts = {kind: Counter[str]() for kind in kinds}
        failures: dict[str, list[str]] = {kind: [] for kind in kinds}
        started = time.monotonic()
        with Progress(console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("inputs", total=len(jobs))
            for kind, index, outcome, said in run_all(jobs, chosen.seed, sound):
                counts[kind][outcome] += 1
                if outcome in ("traceback", "half", "hang"):
                    failures[kind].append(f"--kind {kind} --index {index}: {outcome}\n{said}")
                progress.advance(task)
    table = Table("kind", "inputs", "accepted", "refused", "tracebacks", "half outputs", "hangs")
    for kind, count in counts.items():
        columns = ("accepted", "refused", "traceback", "half", "hang")
        table.add_row(kind, str(count.total()), *(str(count[column]) for column in columns))
    console.print(table)
    console.print(f"seed {chosen.seed}, {len(jobs)} inputs, {time.monotonic() - started:.0f} s")
    for failed in failures.values():
        for text in failed[: chosen.show]:
            first, *lines = text.splitlines()
            print("\n".join([first, *lines[-7:]]) + "\n")
    return int(any(failures.values()))


if __name__ == "__main__":
    sys.exit(main())
