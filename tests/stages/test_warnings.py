"""What a run should not go on with unseen is said, with the page that explains it."""

import logging
from dataclasses import replace

import pytest
from helpers.small_run import make_run, round_records

from megavar.config.schema import VerifyConfig
from megavar.record_files import write_records
from megavar.records import Answer, Question
from megavar.stages import verify, weigh


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "megavar")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(("logps_of_server", "expected"), [(-0.5, 0), (-0.6, 1)])
def test_log_probs_of_two_engines_that_differ(tmp_path, warnings, logps_of_server, expected):
    run = make_run(tmp_path)
    run.config.score.temperature = run.config.sample.temperature
    run.config.precision.recipe = "fp32"
    traces, _, scores = round_records()
    same = [replace(row, logp_posterior=row.logp_policy) for row in scores]
    served = [
        replace(trace, logp_engine=row.logp_policy * 0 + logps_of_server)
        for trace, row in zip(traces, scores, strict=True)
    ]
    values = {"ess": 3.0, "largest_engine_difference": weigh.engine_difference(served, same)}
    weigh._warn(values, run.config)
    assert len(warnings()) == expected
    assert all("docs/troubleshooting.md#large-engine-difference" in line for line in warnings())


@pytest.mark.parametrize(("ess", "expected"), [(1.05, 1), (3.0, 0), (0.0, 0)])
def test_an_effective_sample_size_near_one(tmp_path, warnings, ess, expected):
    weigh._warn({"ess": ess}, make_run(tmp_path).config)
    assert len(warnings()) == expected
    assert all("is 1.05 of 4 traces" in line and "#ess-near-1" in line for line in warnings())


def test_answers_that_no_verifier_has_judged(tmp_path, warnings):
    """The ground-truth answer is no mathematics, so each verdict is an error."""
    questions = [Question("a", "x", "1"), Question("b", "x", "")]
    ids = round_records()[1][0].answer_ids
    answers = [Answer(row.id, 0, index, 1, ids, "\\boxed{1}", "stop", 0) for row in questions for index in range(3)]
    write_records(tmp_path / "good.parquet", answers[:3], Answer)
    write_records(tmp_path / "bad.parquet", answers, Answer)
    verify.verify_answers(lambda: questions[:1], tmp_path / "good.parquet", VerifyConfig(), 1.0, tmp_path / "good")
    assert warnings() == []
    verify.verify_answers(lambda: questions, tmp_path / "bad.parquet", VerifyConfig(), 1.0, tmp_path / "bad")
    (line,) = warnings()
    assert "3 of 6 answers have no judgement" in line and "#verdicts-are-errors-or-time-outs" in line
