"""What other trainers get is what the policy is trained on, with its weights."""

import json
from collections import Counter

import numpy as np
import pytest
from helpers.small_run import EVIL, QUESTIONS, make_run, trace_text
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megavar import cli
from megavar.record_files import read_records
from megavar.records import Weight
from megavar.stages.policy import _sequences


def export(run, *arguments):
    return cli.main(["export-traces", str(run.folder), *arguments])


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_messages_are_the_users_question_and_the_whole_text_of_the_policy(tmp_path, capsys):
    run = make_run(tmp_path)
    assert export(run, "--format", "messages") == 0
    rows = lines(run.folder / "export" / "messages.jsonl")
    assert f"messages.jsonl: {len(rows)} sequences" in capsys.readouterr().out
    weights = {(row.question_id, row.trace_index): row.weight
               for row in read_records(run.round / "weights" / "data.parquet", Weight) if row.weight > 0}  # fmt: skip
    total = Counter()
    for row in rows:
        total[row["question_id"], row["trace_index"]] += row["weight"]
        user, assistant = row["messages"]
        (question,) = (each for each in QUESTIONS if each.id == row["question_id"])
        assert user == {"role": "user", "content": run.config.templates.policy.format(question=question.question)}
        assert assistant["role"] == "assistant"
        assert assistant["content"].startswith(run.config.templates.open_marker + trace_text(row["trace_index"]))
    assert total == pytest.approx(weights)
    assert any(EVIL in row["messages"][0]["content"] for row in rows)


def test_sharegpt_has_the_same_texts_and_the_system_message(tmp_path):
    run = make_run(tmp_path)
    assert export(run, "--format", "messages") == export(run, "--format", "sharegpt") == 0
    rows = lines(run.folder / "export" / "sharegpt.jsonl")
    for row, other in zip(rows, lines(run.folder / "export" / "messages.jsonl"), strict=True):
        assert [turn["value"] for turn in row["conversations"]] == [turn["content"] for turn in other["messages"]]
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] and row["weight"] == other["weight"]


def test_megatrons_data_set_holds_the_very_tokens_that_are_trained_on(tmp_path):
    run = make_run(tmp_path)
    assert export(run, "--format", "megatron", "--output", str(tmp_path / "out")) == 0
    found, weights = IndexedDataset(str(tmp_path / "out" / "traces")), np.load(tmp_path / "out" / "weights.npy")
    trained = [sequence for some in _sequences(run) for sequence in some]
    assert len(found) == len(trained) > 0
    expected = Counter(
        (*sequence.prompt_ids.tolist(), *sequence.target_ids.tolist(), sequence.weight) for sequence in trained
    )
    assert Counter((*found[index].tolist(), weight) for index, weight in enumerate(weights.tolist())) == expected


def test_resampled_traces_are_one_a_question_with_its_whole_weight(tmp_path):
    run = make_run(tmp_path)
    assert export(run, "--format", "messages", "--selection", "resample") == 0
    rows = lines(run.folder / "export" / "messages.jsonl")
    traces = {(row["question_id"], row["trace_index"]) for row in rows}
    assert Counter(question for question, _ in traces) == {row["question_id"]: 1 for row in rows}
    totals = Counter()
    for row in rows:
        totals[row["question_id"]] += row["weight"]
    assert totals == pytest.approx(dict.fromkeys(totals, 1.0))


def test_what_is_not_there_or_would_be_overwritten_is_refused(tmp_path, capsys):
    run = make_run(tmp_path, stages=("sft",))
    assert export(run, "--format", "messages") == 2
    assert "no round has finished `weigh`" in capsys.readouterr().out
    assert cli.main(["export-traces", str(tmp_path), "--format", "messages"]) == 2
    assert "is not a run folder" in capsys.readouterr().out
    done = make_run(tmp_path, "done")
    assert export(done, "--format", "messages") == 0
    assert export(done, "--format", "messages") == 2
    assert "messages.jsonl exists; move it away" in capsys.readouterr().out


def test_questions_that_were_changed_since_they_were_sampled_are_refused(tmp_path, capsys):
    run = make_run(tmp_path)
    file = tmp_path / "questions.jsonl"
    text = file.read_text()
    file.write_text(text.replace('"1+1"', '"7*7"'))
    assert export(run, "--format", "messages") == 2
    assert "stage sample was finished with data.train=" in capsys.readouterr().out
    assert not (run.folder / "export" / "messages.jsonl").exists()
    file.unlink()
    assert export(run, "--format", "messages") == 2 and f"No question file {file}" in capsys.readouterr().out
    file.write_text(text)
    assert export(run, "--format", "messages") == 0


@pytest.mark.parametrize("form", ["messages", "megatron"])
def test_a_place_below_a_file_is_refused(tmp_path, capsys, form):
    run = make_run(tmp_path)
    for target in (tmp_path / "questions.jsonl" / "out", tmp_path / "questions.jsonl" / "new" / "out"):
        assert export(run, "--format", form, "--output", str(target)) == 2
        printed = capsys.readouterr()
        assert f"{tmp_path}/questions.jsonl is a file" in printed.out and "Traceback" not in printed.err
