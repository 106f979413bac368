"""A set of sequences is on disk once, as it was given, and never taken for another one."""

import json

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megavar.records import TrainSequence
from megavar.sequences import NO_TEXT, in_memory
from megavar.training import sequence_files
from megavar.training.sequence_files import open_sequences, shared_sequences, write_documents


def ids(*values):
    return np.array(values, np.int32)


def chunks():
    """Two traces of one question, the first with two answers; then a sequence without an answer."""
    prompt, trace, other = ids(1, 2, 3), ids(4, 5), ids(6)
    return [
        [
            TrainSequence(prompt, trace, 0.25, ids(7)),
            TrainSequence(prompt, trace, 0.25, ids(8, 9)),
            TrainSequence(prompt, other, 0.5, ids(7, 7)),
        ],
        [],
        [TrainSequence(ids(10), ids(11, 12, 13), -1.5)],
    ]


def flat():
    return [sequence for some in chunks() for sequence in some]


def assert_same(found):
    assert len(found) == 4
    for sequence, expected in zip(found, flat(), strict=True):
        assert sequence.prompt_ids.tolist() == expected.prompt_ids.tolist()
        assert sequence.target_ids.tolist() == expected.target_ids.tolist()
        assert sequence.target_ids.dtype == np.int32 and sequence.weight == expected.weight
    assert found.num_tokens.tolist() == [6, 7, 6, 4] and found.num_targets.tolist() == [3, 4, 3, 3]


def test_sequences_come_back_and_shared_texts_are_stored_once(tmp_path):
    found = shared_sequences(tmp_path / "set", "key", chunks)
    assert_same(found)
    assert_same(in_memory(flat()))
    assert (tmp_path / "set" / "texts.bin").stat().st_size == 4 * (3 + 2 + 1 + 2 + 1 + 2 + 1 + 3)
    assert found.parts[:2, :2].tolist() == [[0, 1], [0, 1]] and found.parts[3, 2] == NO_TEXT


def never():
    raise AssertionError("made again")


def test_a_set_that_is_there_is_not_made_again(tmp_path):
    shared_sequences(tmp_path / "set", "key", chunks)
    assert_same(shared_sequences(tmp_path / "set", "key", never))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "texts.bin").write_bytes(b"1234"), "texts.bin has 4 bytes, 60 were written"),
        (lambda folder: (folder / "texts.bin").write_bytes(bytes(60)), "texts.bin has another checksum"),
        (lambda folder: (folder / "texts.idx").write_bytes((folder / "weights.npy").read_bytes()), "texts.idx has"),
        (lambda folder: (folder / "parts.npy").unlink(), "parts.npy has None bytes"),
        (lambda folder: (folder / "made_from.json").write_text('{"made_from"'), "is incomplete"),
        (lambda folder: (folder / "made_from.json").write_text("[]"), "is incomplete"),
        (
            lambda folder: (folder / "made_from.json").write_text(
                json.dumps({**json.loads((folder / "made_from.json").read_text()), "made_from": "else"})
            ),
            "was made from other data",
        ),
    ],
    ids=["truncated", "zeros", "other idx", "missing", "half", "no object", "other data"],
)  # fmt: skip
def test_a_damaged_set_or_one_of_other_data_is_named_and_written_again(tmp_path, capsys, damage, said):
    shared_sequences(tmp_path / "set", "key", chunks)
    damage(tmp_path / "set")
    assert_same(shared_sequences(tmp_path / "set", "key", chunks))
    assert said in capsys.readouterr().out
    assert_same(open_sequences(tmp_path / "set"))


def test_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no sequence to train on"):
        shared_sequences(tmp_path / "set", "key", lambda: [[]])


def test_a_rank_that_never_sees_the_set_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sequence_files, "LATE_SECONDS", 0.0)
    monkeypatch.setattr(sequence_files, "on_rank_zero", lambda work: None)
    with pytest.raises(sequence_files.ExplainedFailure, match="runs_dir must be a folder that all nodes share"):
        shared_sequences(tmp_path / "set", "key", chunks)


def test_documents_are_megatrons_own(tmp_path):
    assert write_documents(tmp_path, flat()) == 4
    found = IndexedDataset(str(tmp_path / "traces"))
    for index, sequence in enumerate(flat()):
        assert found[index].tolist() == [*sequence.prompt_ids.tolist(), *sequence.target_ids.tolist()]
    assert found.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert np.load(tmp_path / "prompt_lengths.npy").tolist() == [3, 3, 3, 1]
    assert np.load(tmp_path / "weights.npy").tolist() == [0.25, 0.25, 0.5, -1.5]
