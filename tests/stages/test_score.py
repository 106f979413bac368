"""The score stage: one forward serves both sides where the policy drew the traces; kept rows are of those traces."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from megavar.config.schema import ParallelConfig, PrecisionConfig, ScoreConfig, TemplateConfig
from megavar.data.templates import Templates
from megavar.record_files import read_records, write_records
from megavar.records import Answer, Question, Score, Trace
from megavar.stages.score import Scoring, TraceSet, score_traces
from megavar.training import parallel

BASE = Path(__file__).parents[2] / "examples" / "base" / "qwen3-tiny"
QUESTION = Question("a", "7+3", "0", "\n\\boxed{0}")


@pytest.fixture
def score(tmp_path):
    """score(traces, posterior, folder) -> the rows; on one rank."""
    templates = Templates(BASE, TemplateConfig())
    parallel.start_alone()

    def call(texts, posterior, folder):
        prompt = templates.policy_prompt(QUESTION)
        traces = [
            Trace("a", index, 1, "policy", prompt, _ids(templates, text), None, finish, 0)
            for index, (text, finish) in enumerate(texts)
        ]
        answers = [Answer("a", 0, 0, 1, np.array([1], np.int32), "0", "stop", 0, True)]
        scoring = Scoring(ScoreConfig(), ParallelConfig(), PrecisionConfig(dtype="fp32"))
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
    once, twice = score(TEXTS, BASE, "once"), score(TEXTS, tmp_path / "same", "twice")
    assert [row.trace_index for row in once] == [0, 1, 2] and len(once[2].logp_posterior) == 0
    for row, other in zip(once, twice, strict=True):
        assert (row.num_answers, row.num_correct) == (other.num_answers, other.num_correct)
        for column in ("logp_policy", "logp_posterior", "logp_answer"):
            assert getattr(row, column) == pytest.approx(getattr(other, column), abs=2e-5)


@pytest.mark.parametrize("posterior", [BASE, None])
def test_kept_rows_of_other_traces_are_refused(score, tmp_path, posterior):
    posterior = posterior or shutil.copytree(BASE, tmp_path / "other")
    score(TEXTS, posterior, "scores")
    with pytest.raises(ValueError, match="an existing score of trace 1 of question 'a' is of another trace"):
        score([TEXTS[0], ("7+3\n0\n", "closed"), TEXTS[2]], posterior, "scores")
