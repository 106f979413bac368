"""The score stage: one forward serves both sides where the policy drew the traces; kept rows are of those traces."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.tiny_models import reference_logps
from transformers import AutoModelForCausalLM

from megavar.config.schema import ParallelConfig, PrecisionConfig, ScoreConfig, TemplateConfig
from megavar.data.templates import Templates
from megavar.packing import partition
from megavar.record_files import read_records, table_of, write_records
from megavar.records import Answer, Question, Score, Scored, Trace, TrainSequence
from megavar.stages.score import Scoring, TraceSet, _counts, _places_scored_again, score_traces
from megavar.training import parallel
from megavar.training.scorer import Scorer

BASE = Path(__file__).parents[2] / "examples" / "base" / "qwen3-tiny"
QUESTION = Question("a", "7+3", "0", "\n\\boxed{0}")


@pytest.fixture
def score(tmp_path):
    """score(traces, posterior, folder) -> the rows; on one rank. The traces follow the prompt of that name."""
    templates = Templates(BASE, TemplateConfig())
    parallel.start_alone()

    def call(texts, posterior, folder, prompt_of="policy_prompt", **config):
        prompt = getattr(templates, prompt_of)(QUESTION)
        traces = [
            Trace("a", index, 1, "policy", prompt, _ids(templates, text), None, finish, 0)
            for index, (text, finish) in enumerate(texts)
        ]
        answers = [Answer("a", 0, 0, 1, np.array([1], np.int32), "0", "stop", 0, True)]
        scoring = Scoring(ScoreConfig(**config), ParallelConfig(), PrecisionConfig(recipe="fp32"))
        write_records(tmp_path / "traces.parquet", traces, Trace)
        write_records(tmp_path / "verified.parquet", answers, Answer)
        trace_set = TraceSet([QUESTION], templates, tmp_path / "traces.parquet", tmp_path / "verified.parquet")
        score_traces(trace_set, BASE, posterior, scoring, tmp_path / folder, folder)
        return read_records(tmp_path / folder / "data.parquet", Score)

    yield call
    parallel.stop()


def _ids(templates, text):
    return templates.trace(Question("a", "7+3", "0", trace=text))


TEXTS = [("7+3\n0\n", "closed"), ("7+3\n", "closed"), ("7", "length")]


def test_traces_of_the_policy_are_scored_once(score, tmp_path):
    shutil.copytree(BASE, tmp_path / "same")
    once, twice = score(TEXTS, None, "once"), score(TEXTS, tmp_path / "same", "twice")
    assert [row.trace_index for row in once] == [0, 1, 2] and len(once[2].logp_posterior) == 0
    for row, other in zip(once, twice, strict=True):
        assert (row.num_answers, row.num_correct) == (other.num_answers, other.num_correct)
        for column in ("logp_policy", "logp_posterior", "logp_answer"):
            assert getattr(row, column) == pytest.approx(getattr(other, column), abs=2e-5)


@pytest.mark.parametrize("posterior", [BASE, None])
def test_kept_rows_of_other_traces_are_refused(score, posterior):
    score(TEXTS, posterior, "scores")
    with pytest.raises(ValueError, match="an existing score of trace 1 of question 'a' is of another trace"):
        score([TEXTS[0], ("7+3\n0\n", "closed"), TEXTS[2]], posterior, "scores")


@pytest.mark.parametrize("folder", ["policy", "policy_again"])
@pytest.mark.parametrize("moved", [4, 3], ids=["a token", "a part of one"])
def test_kept_parts_that_divide_trace_and_answer_elsewhere_are_refused(score, tmp_path, folder, moved):
    templates = Templates(BASE, TemplateConfig())
    sizes, of_answer = [len(_ids(templates, text)) for text, finish in TEXTS[:2]], len(templates.answer(QUESTION))
    wrong = [
        Scored(row, bytes(4 * size + moved), bytes(4 * of_answer - moved)) for row, size in enumerate(sizes)
    ]  # fmt: skip
    write_records(tmp_path / "scores" / folder / "part-000000.parquet", wrong, Scored)
    with pytest.raises(ValueError, match=f"existing scores are of other traces; remove {tmp_path}/scores and run"):
        score(TEXTS, None, "scores")


def test_parts_that_an_older_version_wrote_are_made_again(score, tmp_path, caplog):
    expected = score(TEXTS, None, "whole")
    floats = [pa.array([[0.5]], pa.list_(pa.float32())) for _ in range(2)]
    (tmp_path / "scores" / "policy").mkdir(parents=True)
    part = tmp_path / "scores" / "policy" / "part-000000.parquet"
    pq.write_table(pa.table([pa.array([0]), *floats], ["row", "logp_trace", "logp_answer"]), part)
    found = score(TEXTS, None, "scores")
    assert "it is now part-000000.parquet.damaged, and what it held is made again" in caplog.text
    for row, same in zip(expected, found, strict=True):
        assert row.logp_policy.tobytes() == same.logp_policy.tobytes()


@pytest.mark.parametrize("posterior", [BASE, None])
def test_a_round_without_a_closed_trace_has_empty_scores(score, posterior):
    rows = score([("7", "length"), ("7+3", "aborted")], posterior, "scores")
    assert [(len(row.logp_policy), len(row.logp_answer), row.num_answers, row.leakage) for row in rows] == [
        (0, 0, None, None)
    ] * 2


@pytest.fixture
def other(tmp_path):
    """A model of the same architecture with other weights."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * weight.std() * torch.randn_like(weight)
    folder = shutil.copytree(BASE, tmp_path / "perturbed")
    model.save_pretrained(folder)
    return folder


MIXED = [("7", "length"), ("7+3\n0\n", "closed"), ("7+", "length"), ("7+3\n", "closed"), ("7+3\n1\n", "closed")]


def test_each_trace_gets_its_own_log_probs_of_each_model(score, other):
    """Against transformers, with truncated traces before and between the others; one sequence a chunk."""
    rows = score(MIXED, other, "scores", chunk_sequences=1)
    templates = Templates(BASE, TemplateConfig())
    prompt, answer = templates.policy_prompt(QUESTION), templates.answer(QUESTION)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (BASE, other)]
    for row, (text, finish) in zip(rows, MIXED, strict=True):
        found = (row.logp_policy, row.logp_answer, row.logp_posterior)
        if finish == "length":
            assert [len(logps) for logps in found] == [0, 0, 0] and row.num_answers is None
            continue
        trace = _ids(templates, text)
        with torch.no_grad():
            policy, posterior = (
                reference_logps(model, TrainSequence(prompt, trace, 1.0, answer)).numpy() for model in models
            )
        size = len(trace)
        for logps, expected in zip(found, (policy[:size], policy[size:], posterior[:size]), strict=True):
            assert logps == pytest.approx(expected, abs=2e-5)
        assert np.abs(policy[:size] - posterior[:size]).max() > 1e-3


def test_the_policy_shown_the_hint_is_scored_under_either_prompt(score, monkeypatch):
    """One load of the model; against transformers."""
    loaded = []

    class Counted(Scorer):
        def __init__(self, model, *rest):
            loaded.append(model)
            super().__init__(model, *rest)

    monkeypatch.setattr("megavar.stages.score.Scorer", Counted)
    rows = score(MIXED, BASE, "scores", "posterior_prompt")
    assert len(loaded) == 1
    templates = Templates(BASE, TemplateConfig())
    prompts = [templates.policy_prompt(QUESTION), templates.posterior_prompt(QUESTION)]
    assert "Hint: the final answer is 0." in templates.decode(prompts[1])
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    for row, (text, finish) in zip(rows, MIXED, strict=True):
        if finish == "closed":
            sequences = [TrainSequence(prompt, _ids(templates, text), 1.0) for prompt in prompts]
            with torch.no_grad():
                expected = [reference_logps(model, sequence).numpy() for sequence in sequences]
            assert row.logp_policy == pytest.approx(expected[0], abs=2e-5)
            assert row.logp_posterior == pytest.approx(expected[1], abs=2e-5)
            assert np.abs(expected[0] - expected[1]).max() > 1e-3


SAYING = [("7", "length"), ("70+3\n0\n0\n", "closed"), ("7+3\n", "closed"), ("0", "length"), ("0", "closed")]


def test_leakage_is_what_transformers_gives_the_answer_after_the_trace_before_it(score):
    """Under either prompt; the answer is "0", which "70" does not say, nor a truncated trace with all of it."""
    rows = score(SAYING, BASE, "scores", "posterior_prompt")
    templates = Templates(BASE, TemplateConfig())
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    assert [row.answer_start is None for row in rows] == [True, False, True, True, False]
    for row, (text, _) in zip(rows, SAYING, strict=True):
        if row.answer_start is None:
            assert (row.answer_stop, row.leakage, row.leakage_posterior) == (None, None, None)
            continue
        trace, begin = _ids(templates, text), row.answer_start
        before = templates.decode(trace[:begin])
        assert (before, templates.decode(trace[begin : row.answer_stop])) == (
            ("70+3\n", "0") if "7" in text else ("", "0")
        )
        for prompt, found in (("policy", row.leakage), ("posterior", row.leakage_posterior)):
            prompt_ids = getattr(templates, f"{prompt}_prompt")(QUESTION)
            said = TrainSequence(np.concatenate([prompt_ids, trace[:begin]]), trace[begin : row.answer_stop], 1.0)
            with torch.no_grad():
                assert found == pytest.approx(-float(reference_logps(model, said).sum()), abs=2e-5)
        assert abs(row.leakage - row.leakage_posterior) > 1e-3


def test_an_interrupted_call_goes_on_with_what_each_rank_had_written(score, tmp_path, other, monkeypatch):
    whole = score(MIXED, other, "whole")
    calls = []

    class Interrupted(Scorer):
        def score(self, sequences, indices, *rest):
            calls.append(list(indices))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().score(sequences, indices, *rest)

    monkeypatch.setattr("megavar.stages.score.Scorer", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(MIXED, other, "scores", chunk_sequences=1)
    (tmp_path / "scores" / "policy" / "part-000000.parquet").rename(
        tmp_path / "scores" / "policy" / "part-000000-3.parquet"
    )
    monkeypatch.undo()
    again = score(MIXED, other, "scores", chunk_sequences=2)
    assert calls == [[0], [2], [4]]
    for row, expected in zip(again, whole, strict=True):
        for column in ("logp_policy", "logp_posterior", "logp_answer"):
            assert getattr(row, column) == pytest.approx(getattr(expected, column), abs=2e-5)
    assert sorted(file.name for file in (tmp_path / "scores").iterdir()) == ["again.parquet", "data.parquet"]


def test_whenever_it_is_interrupted_the_same_scores_come_out_of_both_passes(score, tmp_path, other, monkeypatch):
    """Once at each call of each pass of each model, in a row."""
    score(MIXED, other, "whole", chunk_sequences=1)
    calls = []

    class Interrupted(Scorer):
        def score(self, sequences, indices, *rest):
            calls.append(indices)
            if len(calls) % 2 == 0:
                raise KeyboardInterrupt
            return super().score(sequences, indices, *rest)

    monkeypatch.setattr("megavar.stages.score.Scorer", Interrupted)
    interruptions = 0
    while not (tmp_path / "scores" / "data.parquet").exists():
        try:
            score(MIXED, other, "scores", chunk_sequences=1)
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == 11  # of 3 traces, 2 passes and 2 models; the last call was good
    for name in ("data.parquet", "again.parquet"):
        assert (tmp_path / "scores" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    (tmp_path / "scores" / "policy").mkdir()  # as a kill before the clean-up leaves it
    score(MIXED, other, "scores", chunk_sequences=1)
    assert {path.name for path in (tmp_path / "scores").iterdir()} == {"data.parquet", "again.parquet"}


def test_traces_are_scored_again_in_other_packs(score, tmp_path, other, monkeypatch):
    packs = []

    class Watched(Scorer):
        def score(self, sequences, indices, temperature, microbatch_tokens):
            lengths = [int(sequences.num_tokens[index]) for index in indices]
            packs.append([len(found) for found in partition(lengths, microbatch_tokens, 1)[0]])
            return super().score(sequences, indices, temperature, microbatch_tokens)

    monkeypatch.setattr("megavar.stages.score.Scorer", Watched)
    rows = score(MIXED, other, "scores")
    assert [sum(pack) for pack in packs] == [3, 3, 3, 3]
    assert all(len(second) > len(first) for first, second in (packs[:2], packs[2:]))
    again = read_records(tmp_path / "scores" / "again.parquet", Score)
    closed = [row for row in rows if len(row.logp_policy)]
    assert [row.trace_index for row in again] == [row.trace_index for row in closed] == [1, 3, 4]
    for row, second in zip(closed, again, strict=True):
        assert second.num_answers is None
        for column in ("logp_policy", "logp_posterior", "logp_answer"):
            assert getattr(second, column) == pytest.approx(getattr(row, column), abs=2e-5)


@pytest.mark.parametrize(("num_questions", "num_traces"), [(1000, 8), (1000, 1), (10, 8), (1, 200)])
def test_all_traces_of_evenly_spread_questions_are_scored_again(tmp_path, num_questions, num_traces):
    nothing, finishes = np.array([1], np.int32), ("closed", "closed", "length", "closed")
    traces = [
        Trace(f"{question:04d}", index, 1, "policy", nothing, nothing, None, finishes[(question + index) % 4], 0)
        for question in range(num_questions)
        for index in range(num_traces)
    ]
    write_records(tmp_path / "traces.parquet", traces, Trace)
    closed = [int(trace.question_id) for trace in traces if trace.finish == "closed"]
    places = _places_scored_again(TraceSet([], None, tmp_path / "traces.parquet", None))
    chosen = sorted({closed[place] for place in places})
    assert places.tolist() == [place for place, question in enumerate(closed) if question in chosen]
    assert abs(len(places) - min(len(closed), 64)) <= 2 or num_questions == 1
    questions = sorted(set(closed))
    assert chosen[0] == questions[0] and (num_questions == 1 or chosen[-1] == questions[-1])


def _answer(question, trace, index, correct):
    return Answer(question, trace, index, 1, np.zeros(0, np.int32), "", "stop", 0, correct)


def test_answers_are_counted_trace_by_trace():
    """Against a count in plain Python; some traces are open or have no answers, some questions have no trace."""
    random = np.random.default_rng(0)
    keys = [(question, trace) for question in "bcdf" for trace in range(5)]
    answers = [
        _answer(question, trace, index, bool(random.random() < 0.5))
        for question in "abdefg"
        for trace in range(6)
        for index in range(random.integers(4))
    ]
    closed = random.random(len(keys)) < 0.7
    traces = pa.table(
        {"question_id": [key[0] for key in keys], "trace_index": pa.array([key[1] for key in keys], "i4")}
    )
    found = _counts(traces, closed, table_of(answers, Answer), pa.array(["c"]))
    for (question, trace), is_closed, *counts in zip(
        keys, closed, *(column.to_pylist() for column in found), strict=True
    ):
        verdicts = [row.correct for row in answers if (row.question_id, row.trace_index) == (question, trace)]
        known = is_closed and (verdicts or question == "c")
        assert counts == ([len(verdicts), sum(verdicts)] if known else [None, None])


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([_answer("a", 1, 0, True), _answer("a", 1, 0, True)], "answer 0 of trace 1 of question 'a' occurs twice"),
        ([_answer("a", 1, 0, True), _answer("a", 1, 1, None)], "answer 1 of trace 1 of question 'a' has no verdict"),
    ],
)
def test_an_answer_that_cannot_be_counted_is_named(answers, message):
    traces = pa.table({"question_id": ["a", "a"], "trace_index": pa.array([0, 1], "i4")})
    with pytest.raises(ValueError, match=message):
        _counts(traces, np.ones(2, bool), table_of(answers, Answer), pa.array([], pa.string()))
