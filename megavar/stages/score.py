"""Scores every trace under the policy and the posterior, by the training engine's forward on all ranks.

Each data-parallel rank reads the sequences of its own microbatches and writes its own log-probs; rank 0 merges what
all have written. Some traces are scored again in other packs, from which `weigh` tells how far rounding moves weights.
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from megavar.checkpoints.convert import Model
from megavar.config.schema import ParallelConfig, PrecisionConfig, ScoreConfig
from megavar.data.answer_in_trace import AnswerFinder, answer_to_find
from megavar.data.question_tokens import QuestionTexts
from megavar.joins import (
    OUTPUTS_DO_NOT_MATCH,
    Key,
    answers_by_trace,
    by_question,
    check_complete,
    count_correct,
    identities,
)
from megavar.progress import ProgressLine
from megavar.ranks import barrier, from_rank_zero, is_rank_zero, rank
from megavar.record_files import (
    RecordFile,
    RecordFileWriter,
    RecordWriter,
    floats,
    list_column,
    lists,
    merge,
    parts,
    rows,
    write_records,
)
from megavar.records import Answer, Question, Score, Scored, TokenIds, Trace, TraceFinish, TrainSequence, schema_of
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest
from megavar.sequences import NO_TEXT, SequenceSet
from megavar.stages.run_files import question_tokens, round_questions, sampler_folder
from megavar.stopping import Stopped
from megavar.training.parallel import agree
from megavar.training.scorer import Scorer
from megavar.training.sequence_files import shared_sequences
from megavar.verifiers import NO_VERIFIER

NUM_SCORED_AGAIN = 64
"""Traces that are scored twice, about: all those of some questions."""


@dataclass(frozen=True)
class Scoring:
    """How sequences are scored, whatever the model."""

    config: ScoreConfig
    parallel: ParallelConfig
    precision: PrecisionConfig


@dataclass(frozen=True)
class TraceSet:
    """What is scored; rank 0 reads it, and the other ranks only run the models."""

    questions: Sequence[Question]
    texts: QuestionTexts
    traces: Path
    """File of `Trace` records."""
    verified: Path
    """File of their verified `Answer` records."""


def execute(run: Run, service: RolloutService) -> None:
    """Log-probs of every trace under the policy that the round starts with, and under the model it was sampled from."""
    config = run.config
    trace_set = None
    if is_rank_zero():
        traces, verified = (run.round / name / "data.parquet" for name in ("traces", "verified"))
        trace_set = TraceSet(round_questions(run), question_tokens(run), traces, verified)
    key = from_rank_zero(lambda: Manifest(run.folder).made_from(run.entry("score")))
    scoring = Scoring(config.score, config.parallel, PrecisionConfig(config.score_recipe))
    sampler = None if config.sample.sampler == "policy" else sampler_folder(run)
    score_traces(trace_set, run.reference, sampler, scoring, run.round / "scores", key)


def score_traces(
    trace_set: TraceSet | None, policy: Path, sampler: Path | None, scoring: Scoring, folder: Path, made_from: str
) -> None:
    """Write a `Score` for every trace to `folder`; every rank calls it, with the traces on rank 0 and None elsewhere.

    log pi(z|x) and log pi(y'|x, z) of the reference answer come from one forward of the policy, log q(z|x, y') from
    one of the posterior, under the prompt it was sampled with. Where the policy sampled the traces under its own prompt
    the two are equal, and one forward gives both. Truncated traces get empty log-probs. Second scores of some traces go
    to `again.parquet`. Finished chunks of an interrupted call are kept in folders of their own until all are complete.

    Args:
        sampler: the model that the traces were sampled from under the posterior's prompt, a Hugging Face folder, which
            may be `policy`; None: the policy sampled them under its own.
        made_from: identifies traces, questions and settings.

    Raises:
        ValueError: if existing rows are not of these traces.
    """
    models = {"policy": policy} if sampler is None else {"policy": policy, "posterior": sampler}
    if from_rank_zero(lambda: trace_set is not None and _is_complete(trace_set, folder)):
        _remove_parts(folder)  # the call that merged them may have been killed before it did
        return

    def make() -> Iterator[list[TrainSequence]]:
        assert trace_set is not None
        return _sequences(trace_set, len(models))

    if from_rank_zero(lambda: trace_set is not None and _any_closed(trace_set)):
        sequences = shared_sequences(folder / "sequences", made_from, make)
        again = from_rank_zero(lambda: None if trace_set is None else _places_scored_again(trace_set))
        assert again is not None
        passes_of: dict[Path, list[_Pass]] = defaultdict(list)
        for place, (name, model) in enumerate(models.items()):
            indices = np.arange(place, len(sequences), len(models))
            budget = scoring.config.microbatch_tokens
            passes_of[model] += _passes(sequences, indices, again, folder / name, budget)
        for model, passes in passes_of.items():
            _score_all(model, passes, scoring)
        if trace_set is not None:
            write_records(folder / "again.parquet", _scored_again(trace_set, again, list(models), folder), Score)
    if trace_set is not None:
        scored = [parts(folder / name) for name in models]
        with RecordFileWriter(folder / "data.parquet", Score) as merged:
            for table in _merged(trace_set, scored, AnswerFinder(policy), folder):
                merged.write(table)
        expected = identities(_trace_file(trace_set))
        check_complete(identities(RecordFile(folder / "data.parquet", Score, _KEY)), expected, folder)
    barrier()  # no rank has the sequences open when they go
    _remove_parts(folder)


def _remove_parts(folder: Path) -> None:
    if is_rank_zero():
        for name in ("policy", "posterior", "policy_again", "posterior_again", "sequences"):
            shutil.rmtree(folder / name, ignore_errors=True)


_KEY = ("question_id", "trace_index")
_LOGPS = ("logp_trace", "logp_answer")


def _trace_file(trace_set: TraceSet, *more: str) -> RecordFile[Trace]:
    return RecordFile(trace_set.traces, Trace, (*_KEY, "round", *more, "finish"))


def _any_closed(trace_set: TraceSet) -> bool:
    return any(TraceFinish.CLOSED in table["finish"].to_pylist() for table in _trace_file(trace_set).tables())


def _sequences(trace_set: TraceSet, num_models: int) -> Iterator[list[TrainSequence]]:
    """Of each closed trace, in the order of its file, the sequence under the policy and, of two models, under q."""
    question_of, texts = {question.id: question for question in trace_set.questions}, trace_set.texts
    columns = (*_KEY, "prompt_ids", "trace_ids", "finish")
    for table in RecordFile(trace_set.traces, Trace, columns).tables():
        some: list[TrainSequence] = []
        of_question: dict[str, tuple[TokenIds, TokenIds]] = {}
        for trace in rows(table, Trace, trace_set.traces):
            if trace.finish == TraceFinish.CLOSED:
                if trace.question_id not in of_question:
                    question = question_of[trace.question_id]
                    of_question[question.id] = texts.policy_prompt(question), texts.answer(question)
                prompt, answer = of_question[trace.question_id]
                some.append(TrainSequence(prompt, trace.trace_ids, 1.0, answer))
                some += [TrainSequence(trace.prompt_ids, trace.trace_ids, 1.0)] * (num_models - 1)
        yield some


def _places_scored_again(trace_set: TraceSet) -> NDArray[np.int64]:
    """Places among the closed traces, in the order of their file: all of questions that are spread evenly over it."""
    closed: Counter[str] = Counter()
    for table in _trace_file(trace_set).tables():
        pairs = zip(table["question_id"].to_pylist(), table["finish"].to_pylist(), strict=True)
        closed.update(question for question, finish in pairs if finish == TraceFinish.CLOSED)
    sizes = np.array(list(closed.values()))
    num_questions = min(len(sizes), round(NUM_SCORED_AGAIN / sizes.mean()) or 1)
    chosen = np.linspace(0, len(sizes) - 1, num_questions).astype(int)
    is_chosen = np.isin(np.arange(len(sizes)), chosen)
    return np.flatnonzero(np.repeat(is_chosen, sizes))


def _scored_again(
    trace_set: TraceSet, places: NDArray[np.int64], models: Sequence[str], folder: Path
) -> Iterator[Score]:
    """Second scores of the closed traces at these places, without the counts of their answers."""
    of_models = []
    for name in models:
        tables = RecordWriter(folder / f"{name}_again", Scored, 0.0).existing()
        of_models.append({row.row: row for table in tables for row in rows(table, Scored)})
    wanted, place = set(places.tolist()), -1
    for table in _trace_file(trace_set).tables():
        columns = (table[name].to_pylist() for name in (*_KEY, "round", "finish"))
        for question, index, number, finish in zip(*columns, strict=True):
            place += finish == TraceFinish.CLOSED
            if finish == TraceFinish.CLOSED and place in wanted:
                policy, sampler = of_models[0][place], of_models[-1][place]
                of_bytes = policy.logp_trace, sampler.logp_trace, policy.logp_answer
                of_policy, of_sampler, of_answer = (np.frombuffer(logps, np.float32) for logps in of_bytes)
                yield Score(question, index, number, of_policy, of_sampler, of_answer, None, None)


@dataclass(frozen=True)
class _Pass:
    """Sequences that one model scores in packs of one size."""

    sequences: SequenceSet
    indices: NDArray[np.int64]
    """Of the sequences that this model scores."""
    places: NDArray[np.int64]
    """Among the indices: those that are scored in this pass. A row on disk has the place of its sequence."""
    microbatch_tokens: int
    folder: Path

    def missing(self) -> NDArray[np.int64]:
        """Places that have no row on disk yet."""
        have = from_rank_zero(lambda: _existing(self.sequences, self.indices, self.folder))
        return np.setdiff1d(self.places, have)


def _passes(
    sequences: SequenceSet, indices: NDArray[np.int64], again: NDArray[np.int64], folder: Path, budget: int
) -> list[_Pass]:
    """All of the sequences with these indices, then those at the places `again` in about half as large packs."""
    num_tokens = sequences.num_tokens[indices[again]]
    half = max(int(num_tokens.max()), min(budget, int(num_tokens.sum())) // 2)  # each sequence must fit
    return [
        _Pass(sequences, indices, np.arange(len(indices)), budget, folder),
        _Pass(sequences, indices, again, half, folder.with_name(f"{folder.name}_again")),
    ]


def _score_all(model: Path, passes: Sequence[_Pass], scoring: Scoring) -> None:
    """Do what is missing of the passes, in their order."""
    left = [(one, missing) for one in passes if len(missing := one.missing())]
    if not left:
        return
    scorer = Scorer(Model(model), scoring.parallel, scoring.precision)
    for one, missing in left:
        _score_missing(scorer, model, one, missing, scoring.config)
    scorer.release()
    barrier()


def _score_missing(scorer: Scorer, model: Path, one: _Pass, missing: NDArray[np.int64], config: ScoreConfig) -> None:
    """Score the sequences at the places `missing` of a pass, some at a time."""
    writer = RecordWriter(one.folder, Scored, flush_seconds=0.0, rank=rank())
    barrier()  # all have seen which parts there were
    num_tokens, total = 0, len(one.places)
    done = total - len(missing)
    with ProgressLine(f"score {one.folder.name}", done, show=is_rank_zero()) as progress:
        for start in range(0, len(missing), config.chunk_sequences):
            if agree()[0]:
                raise Stopped(f"{done + start} of {total} traces have their scores under {model}")
            chunk = missing[start : start + config.chunk_sequences]
            place_of = dict(zip(one.indices[chunk].tolist(), chunk.tolist(), strict=True))
            found_of = scorer.score(one.sequences, list(place_of), config.temperature, one.microbatch_tokens)
            found = sorted(found_of.items())  # as a part is: it is then written without a copy
            writer.append(*(_scored(one.sequences, index, place_of[index], logps) for index, logps in found))
            num_tokens += int(one.sequences.num_tokens[one.indices[chunk]].sum())
            rate = num_tokens / progress.seconds
            progress.update(done + start + len(chunk), total, f"traces, {rate:,.0f} tokens/s")


def _scored(sequences: SequenceSet, index: int, place: int, logps: NDArray[np.float32]) -> Scored:
    sequence = sequences[index]
    size = len(sequence.trace_ids)
    return Scored(place, logps[:size].tobytes(), logps[size:].tobytes())


def _existing(sequences: SequenceSet, indices: NDArray[np.int64], folder: Path) -> NDArray[np.int64]:
    """Numbers of the rows on disk; a row must be of the sequence with its number."""
    found = [np.zeros(0, np.int64)]
    for table in RecordWriter(folder, Scored, 0.0).existing():
        places = table["row"].to_numpy()
        num_bytes = np.stack([pc.binary_length(table[name]).to_numpy() for name in _LOGPS])
        known = places[(places >= 0) & (places < len(indices))]
        if len(known) < len(places) or (num_bytes != _logp_bytes(sequences, indices[known])).any():
            raise ValueError(
                f"existing scores are of other traces; remove {folder.parent} and run `megavar score` again "
                f"({OUTPUTS_DO_NOT_MATCH})."
            )
        found.append(places)
    return np.unique(np.concatenate(found))


def _logp_bytes(sequences: SequenceSet, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """[2, indices] bytes of the float32 log-probs of each sequence's trace, and of its answer."""
    numbers, places = np.unique(sequences.parts[indices, 2], return_inverse=True)
    sizes = [0 if number == NO_TEXT else len(sequences.texts[number]) for number in numbers.tolist()]
    answer_tokens = np.array(sizes, np.int64)[places]
    return 4 * np.stack([sequences.num_targets[indices] - answer_tokens, answer_tokens])


def _is_complete(trace_set: TraceSet, folder: Path) -> bool:
    """Whether an earlier call has finished; its rows must be of these traces."""
    file = folder / "data.parquet"
    if not file.exists():
        return False
    traces = RecordFile(trace_set.traces, Trace, (*_KEY, "round", "trace_ids", "finish"))
    for some_traces, some_scores in by_question(traces, RecordFile(file, Score, (*_KEY, "round", "logp_policy"))):
        closed = np.array(some_traces["finish"].to_pylist()) == TraceFinish.CLOSED
        lengths = np.diff(lists(some_traces["trace_ids"])[1]) * closed
        wanted = _described(some_traces, lengths)
        of_scores = _described(some_scores, np.diff(lists(some_scores["logp_policy"])[1]))
        if wanted != of_scores:
            question, trace = min(wanted.items() ^ of_scores.items())[0]
            raise ValueError(
                f"an existing score of trace {trace} of question {question!r} is of another trace, or missing; remove "
                f"{folder} and run `megavar score` again ({OUTPUTS_DO_NOT_MATCH})."
            )
    return True


def _described(table: pa.Table, lengths: NDArray[np.int64]) -> dict[Key, tuple[int, int]]:
    """Round and number of tokens of each trace."""
    keys = zip(*(table[name].to_pylist() for name in _KEY), strict=True)
    return dict(zip(keys, zip(table["round"].to_pylist(), lengths.tolist(), strict=True), strict=True))


def _merged(trace_set: TraceSet, scored: list[list[Path]], finder: AnswerFinder, folder: Path) -> Iterator[pa.Table]:
    """Tables of `Score`: the rows of all ranks under each model, beside the traces and the counts of their answers."""
    answer_of = {question.id: answer_to_find(question) for question in trace_set.questions}
    without_verifier = [question.id for question in trace_set.questions if question.verifier == NO_VERIFIER]
    unjudged = pa.array(without_verifier, pa.string())
    scored_rows = _ScoredRows(merge(scored, Scored, folder), folder)
    answers = RecordFile(trace_set.verified, Answer, (*_KEY, "answer_index", "correct"))
    for traces, some_answers in by_question(_trace_file(trace_set, "trace_ids"), answers):
        closed = np.array(traces["finish"].to_pylist()) == TraceFinish.CLOSED
        taken = scored_rows.take(int(closed.sum()))
        under_policy, under_sampler = ([floats(table[name]) for name in _LOGPS] for table in (taken[0], taken[-1]))
        num_answers, num_correct = _counts(traces, closed, some_answers, unjudged)
        columns = {
            **{name: traces[name] for name in (*_KEY, "round")},
            "logp_policy": _spread(under_policy[0], closed),
            "logp_posterior": _spread(under_sampler[0], closed),
            "logp_answer": _spread(under_policy[1], closed),
            "num_answers": num_answers,
            "num_correct": num_correct,
            **_leakage(traces, closed, (under_policy[0], under_sampler[0]), finder, answer_of),
        }
        yield pa.table(columns, schema=schema_of(Score))


def _leakage(
    traces: pa.Table,
    closed: NDArray[np.bool_],
    logps: Sequence[pa.ChunkedArray],
    finder: AnswerFinder,
    answer_of: Mapping[str, str | None],
) -> dict[str, list[Any]]:
    """Columns of `Score`: where each closed trace first says its question's answer, and what the models give it there.

    Args:
        logps: of the closed traces under the policy and the sampler.
    """
    ids, starts = lists(traces["trace_ids"])
    columns: dict[str, list[Any]] = {
        name: [None] * len(traces) for name in ("answer_start", "answer_stop", "leakage", "leakage_posterior")
    }
    questions, of_models = traces["question_id"].to_pylist(), [lists(column) for column in logps]
    for place, row in enumerate(np.flatnonzero(closed)):
        span = finder.find(ids[starts[row] : starts[row + 1]], answer_of[questions[row]])
        if span is not None:
            sums = [
                float(values[begins[place] + span[0] : begins[place] + span[1]].sum(dtype=np.float64))
                for values, begins in of_models
            ]
            for name, value in zip(columns, (*span, -sums[0], -sums[1]), strict=True):
                columns[name][row] = value
    return columns


def _counts(
    traces: pa.Table, closed: NDArray[np.bool_], answers: pa.Table, unjudged: pa.Array
) -> tuple[pa.Array, pa.Array]:
    """[traces] int32 verified answers of each trace, and the correct ones; see `Score`. Both tables are sorted."""
    questions = pc.unique(traces["question_id"])
    answers = answers.filter(pc.is_in(answers["question_id"], questions))

    def places(table: pa.Table) -> NDArray[np.int64]:
        """A number for each trace, ascending."""
        question = pc.index_in(table["question_id"], questions).to_numpy().astype(np.int64)
        numbers: NDArray[np.int64] = question * 2**32 + table["trace_index"].to_numpy()
        return numbers

    of_trace, of_answer = places(traces), places(answers)
    index = answers["answer_index"].to_numpy()
    if ((of_answer[1:] == of_answer[:-1]) & (index[1:] == index[:-1])).any():
        answers_by_trace(rows(answers, Answer))  # names what occurs twice
    first, last = (np.searchsorted(of_answer, of_trace, side) for side in ("left", "right"))
    sums = [
        np.concatenate([[0], np.cumsum(column.to_numpy())])
        for column in (answers["correct"].is_null(), pc.fill_null(answers["correct"], False))
    ]
    num_unjudged, num_correct = (sum_to[last] - sum_to[first] for sum_to in sums)
    for trace in np.flatnonzero(closed & (num_unjudged > 0)):
        count_correct(rows(answers.slice(first[trace], last[trace] - first[trace]), Answer))  # names the first
    num_answers = last - first
    is_unjudged = pc.is_in(traces["question_id"], unjudged).to_numpy()
    unknown = ~closed | ((num_answers == 0) & ~is_unjudged)
    return pa.array(num_answers, pa.int32(), mask=unknown), pa.array(num_correct, pa.int32(), mask=unknown)


def _spread(logps: pa.ChunkedArray, closed: NDArray[np.bool_]) -> pa.Array:
    """The lists of the closed traces, and empty ones for the others."""
    values, starts = lists(logps)
    lengths = np.zeros(len(closed), np.int64)
    lengths[closed] = np.diff(starts)
    return list_column(values, np.concatenate([[0], np.cumsum(lengths)]))


class _ScoredRows:
    """Reads merged rows in their order, each of which must be there."""

    def __init__(self, merged: Iterator[list[pa.Table]], folder: Path) -> None:
        self._merged, self._folder = merged, folder
        self._tables = next(merged)
        self._next = 0

    def take(self, count: int) -> list[pa.Table]:
        """The next rows, a table for each model."""
        while len(self._tables[0]) < count and (more := next(self._merged, None)) is not None:
            self._tables = [pa.concat_tables(pair) for pair in zip(self._tables, more, strict=True)]
        taken = [table.slice(0, count) for table in self._tables]
        expected = np.arange(self._next, self._next + count)
        if any(not np.array_equal(table["row"].to_numpy(), expected) for table in taken):
            raise ValueError(
                f"{self._folder} lacks scores of its traces; remove it and run `megavar score` again "
                f"({OUTPUTS_DO_NOT_MATCH})."
            )
        self._tables, self._next = [table.slice(count) for table in self._tables], self._next + count
        return taken
