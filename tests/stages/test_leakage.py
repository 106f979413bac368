"""`objective.max_leakage`: traces above it are left out, against a computation without them."""

from dataclasses import fields, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.made_scores import random_scores
from helpers.small_run import make_run

from megavar.config.load import load_config
from megavar.config.schema import ObjectiveConfig
from megavar.objectives import OBJECTIVES
from megavar.objectives.base import Objective
from megavar.record_files import RecordFile, read_records, rows, write_records
from megavar.records import Score, Trace, Weight
from megavar.stages import weigh
from megavar.stages.weigh import weigh_traces

NOTHING = np.zeros(0, np.int32)
LEAKAGES = [3.0, None, 0.5, 8.0, 5.0, 5.5]


def scores_of(question, leakages, seed=5):
    made = random_scores(len(leakages), seed)
    return [
        replace(row, question_id=question, leakage=leakage, leakage_posterior=leakage and leakage / 4)
        for row, leakage in zip(made, leakages, strict=True)
    ]


def weighed(folder, scores, cut=(), **settings):
    """(rows, values) of the weigh stage; the traces with these indices are truncated."""
    traces = [
        Trace(row.question_id, row.trace_index, 1, "posterior", NOTHING, NOTHING, None,
              "length" if row.trace_index in cut else "closed", 0)
        for row in scores
    ]  # fmt: skip
    config = ObjectiveConfig(**settings)
    values = weigh_traces([(traces, scores)], config.name, config, folder)
    return read_records(folder / "data.parquet", Weight), values


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"forward_kl", "reverse_kl"}))
def test_the_others_have_the_weights_they_have_without_the_leaky(tmp_path, name):
    settings = {"name": name, "train_answers": "reference", "answer_estimator": "accuracy"}
    scores = scores_of("q", LEAKAGES)
    leaky = {3, 4, 5}
    found, values = weighed(tmp_path / "limited", scores, max_leakage=4.9, **settings)
    as_cut, _ = weighed(tmp_path / "cut", scores, cut=leaky, **settings)
    every, _ = weighed(tmp_path / "all", scores, **settings)
    assert [row.weight for row in found] == [row.weight for row in as_cut]
    for row, whole in zip(found, every, strict=True):
        assert (row.status == "leaky") == (row.trace_index in leaky)
        if row.status == "leaky":
            assert (row.weight, row.log_weight) == (0.0, -np.inf)
            assert (row.log_ratio, row.log_answer) == (whole.log_ratio, whole.log_answer)
    mass = sum(row.weight for row in every if row.trace_index in leaky) / (sum(row.weight for row in every) or 1.0)
    assert values["traces_leaky"] == 3 and values.get("leaky_weight", 0.0) == pytest.approx(mass, rel=1e-12)


def test_weights_without_the_leaky_by_hand(tmp_path):
    """rho_k / sum_j rho_j over the traces of at most 5 nats, those that do not say the answer among them."""
    scores = scores_of("q", LEAKAGES)
    found, values = weighed(tmp_path, scores, max_leakage=5.0)
    rho = np.array([
        np.exp(np.mean(row.logp_policy.astype(float) - row.logp_posterior.astype(float)))
        * row.num_correct / row.num_answers for row in scores
    ])  # fmt: skip
    kept = np.array([leakage is None or leakage <= 5.0 for leakage in LEAKAGES])
    expected = np.where(kept, rho, 0.0) / rho[kept].sum()
    assert [row.weight for row in found] == pytest.approx(expected.tolist(), rel=1e-12)
    assert values["leaky_weight"] == pytest.approx(rho[~kept].sum() / rho.sum(), rel=1e-12)
    said = np.array([leakage is not None for leakage in LEAKAGES])
    nats = np.array([leakage or 0.0 for leakage in LEAKAGES])
    assert values["answer_in_trace"] == 5 / 6 and values["leakage"] == pytest.approx(nats[said].mean())
    assert values["leakage_posterior"] == pytest.approx(nats[said].mean() / 4)
    assert values["leakage_weighted"] == pytest.approx((nats * expected)[said].sum() / expected[said].sum(), rel=1e-12)


def test_a_truncated_trace_says_nothing_and_is_no_closed_one(tmp_path):
    scores = scores_of("q", [None, 1.0, 9.0])
    found, values = weighed(tmp_path, scores, cut={0}, max_leakage=2.0)
    assert [row.status for row in found] == ["truncated", "ok", "leaky"]
    assert values["answer_in_trace"] == 1.0 and values["leakage_weighted"] == 1.0


@pytest.mark.parametrize(
    ("fallback", "expected"),
    [("drop", [0.0, 0.0]), ("gold", [0.0, 0.0, 1.0]), ("geometric_mean", [0.0, 0.0])],
)
def test_a_question_without_any_other_trace_follows_the_rule_for_those_without_a_correct_one(
    tmp_path, fallback, expected
):
    found, values = weighed(tmp_path, scores_of("q", [9.0, 8.0]), max_leakage=2.0, on_no_correct_trace=fallback)
    weight_of = {row.trace_index: row.weight for row in found}
    assert [weight_of[index] for index in (0, 1, -1) if index in weight_of] == expected
    assert {row.status for row in found if row.trace_index >= 0} == {"leaky"} and values["leaky_weight"] == 1.0


def test_traces_beyond_num_traces_and_unverifiable_questions_keep_their_status(tmp_path):
    unjudged = [replace(row, num_answers=0, num_correct=0) for row in scores_of("u", LEAKAGES[:4])]
    found, values = weighed(tmp_path, scores_of("q", LEAKAGES[:4]) + unjudged, max_leakage=2.0, num_traces=3)
    assert [row.status for row in found] == [
        "leaky", "ok", "ok", "unused", "leaky", "unverifiable", "unverifiable", "unused"
    ]  # fmt: skip
    assert values["traces_leaky"] == 2 and values["answer_in_trace"] == 4 / 6


def test_nothing_is_left_out_or_said_without_a_limit_and_without_leakage(tmp_path):
    found, values = weighed(tmp_path / "null", scores_of("q", LEAKAGES))
    assert {row.status for row in found} == {"ok"} and not {"leaky_weight", "traces_leaky"} & values.keys()
    _, values = weighed(tmp_path / "none", scores_of("q", [None, None]), max_leakage=1.0)
    assert not {"answer_in_trace", "leakage", "leakage_posterior", "leakage_weighted", "leaky_weight"} & values.keys()


def test_a_limit_on_scores_of_before_is_refused_and_one_that_nothing_reaches_for_is_said(tmp_path, caplog):
    run = make_run(tmp_path)
    file = run.round / "scores" / "data.parquet"
    limited = replace(run, config=load_config(run.folder / "config.yaml", ["objective.max_leakage=1"]))
    added = ["answer_start", "answer_stop", "leakage", "leakage_posterior"]
    scores = [replace(row, **dict.fromkeys(added)) for row in read_records(file, Score)]
    write_records(file, scores, Score)
    weigh.execute(limited, None)
    assert "objective.max_leakage=1 leaves out none" in caplog.text
    pq.write_table(pq.read_table(file).drop_columns(added), file, write_page_checksum=True)
    weigh.execute(run, None)
    with pytest.raises(ValueError, match=r"remove that folder and the entry score of manifest\.json"):
        weigh.execute(limited, None)


def test_scores_of_before_are_read_without_leakage(tmp_path):
    scores = scores_of("q", LEAKAGES)
    write_records(tmp_path / "new.parquet", scores, Score)
    added = [item.name for item in fields(Score) if item.default is None]
    assert added == ["answer_start", "answer_stop", "leakage", "leakage_posterior"]
    table = pq.read_table(tmp_path / "new.parquet").drop_columns(added)
    pq.write_table(table, tmp_path / "old.parquet", write_page_checksum=True)
    old = RecordFile(tmp_path / "old.parquet", Score)
    assert old.absent == added and not RecordFile(tmp_path / "new.parquet", Score).absent
    for row, before in zip(scores, old.rows(), strict=True):
        assert before.leakage is None and before.logp_policy.tolist() == row.logp_policy.tolist()
    some = RecordFile(tmp_path / "old.parquet", Score, ("question_id", "num_answers", "leakage"))
    (table,) = some.tables()
    assert table.schema == some.schema and [row.leakage for row in rows(table, Score)] == [None] * len(scores)


@pytest.mark.parametrize("limit", [None, 2.0])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: rows[1:], r"gave weights to traces \[1, 2\] of question 'q', expected \[0, 1, 2\]"),
        (lambda rows: [replace(rows[0], weight=np.nan), *rows[1:]], r"weight of trace 0 of question 'q' is nan"),
    ],
    ids=["one missing", "not a number"],
)
def test_an_objective_that_forgets_a_trace_or_gives_no_number_is_named(tmp_path, monkeypatch, limit, spoil, message):
    own = Objective(lambda *given: spoil(OBJECTIVES["iwae"].weigh(*given)))
    monkeypatch.setitem(OBJECTIVES, "own", own)
    with pytest.raises(ValueError, match=f"objective.name=own.*{message}"):
        weighed(tmp_path, scores_of("q", [1.0, 9.0, None]), name="own", max_leakage=limit)


def test_an_objective_that_forgets_what_is_left_out_is_named(tmp_path, monkeypatch):
    own = Objective(lambda *given: [row for row in OBJECTIVES["iwae"].weigh(*given) if row.status != "truncated"])
    monkeypatch.setitem(OBJECTIVES, "own", own)
    scores = scores_of("q", [1.0, 9.0, None])
    assert len(weighed(tmp_path / "all", scores, name="own")[0]) == 3
    with pytest.raises(ValueError, match=r"gave weights to traces \[0, 2\] of question 'q', expected \[0, 1, 2\]"):
        weighed(tmp_path / "limited", scores, name="own", max_leakage=2.0)
