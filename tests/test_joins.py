"""What a stage wrote is counted against what it had to write."""

from pathlib import Path

import numpy as np
import pytest

from megavar.joins import check_complete
from megavar.records import Answer, identity

ANSWERS = [Answer("q", k, n, 1, np.zeros(0, np.int32), "", "stop", 0) for k in range(2) for n in range(3)]


def test_each_record_once_is_complete():
    check_complete(map(identity, ANSWERS), map(identity, ANSWERS), Path("answers"))


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (ANSWERS[:-1], r"answers lacks answer 2 of its trace 1 of question 'q' \(1 such records, 6 belong there\)"),
        ([], r"answers lacks answer 0 of its trace 0 of question 'q' \(6 such records, 6 belong there\)"),
        (
            [*ANSWERS, Answer("p", 0, 0, 1, np.zeros(0, np.int32), "", "stop", 0)],
            "besides what belongs there, answer 0",
        ),
        ([*ANSWERS, ANSWERS[3]], "answers has twice answer 0 of its trace 1"),
    ],
    ids=["one missing", "all missing", "another", "doubled"],
)
def test_a_record_that_is_missing_too_many_or_doubled_is_named(rows, problem):
    with pytest.raises(ValueError, match=problem):
        check_complete(sorted(map(identity, rows)), map(identity, ANSWERS), Path("answers"))
