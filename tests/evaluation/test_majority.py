"""maj@n against enumeration of every way to vote, and of every way in which wrong answers may be the same."""

from fractions import Fraction
from itertools import combinations, pairwise, product
from statistics import multimode

import pytest

from megavar.evaluation.majority import is_open, joined, majority


def ballots(num_samples):
    """Every way in which this many samples answer `right`, one of three wrong answers, or nothing."""
    return product(["right", "a", "b", "c", None], repeat=num_samples)


def partitions(items):
    """Every way to group items."""
    if not items:
        yield []
        return
    first, *rest = items
    for groups in partitions(rest):
        yield [[first], *groups]
        for index, group in enumerate(groups):
            yield [*groups[:index], [first, *group], *groups[index + 1 :]]


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 6])
def test_majority_is_the_chance_of_the_right_answer_among_those_with_most_votes(num_samples):
    for ballot in ballots(num_samples):
        votes = [vote for vote in ballot if vote is not None]
        winners = multimode(votes)
        chance = Fraction(winners.count("right"), len(winners)) if winners else 0
        assert majority(votes.count("right"), [votes.count(other) for other in "abc"]) == pytest.approx(float(chance))


def test_if_the_result_is_not_open_no_grouping_of_wrong_answers_changes_it():
    closed = 0
    for num_correct, *wrong in product(range(7), range(1, 4), range(4), range(4), range(4)):
        wrong = [votes for votes in wrong if votes]
        found = {
            majority(num_correct, [sum(wrong[index] for index in group) for group in groups])
            for groups in partitions(list(range(len(wrong))))
        }
        if not is_open(num_correct, wrong):
            closed += 1
            assert found == {majority(num_correct, wrong)}
    assert closed > 500


def test_pairs_are_joined_along_chains_whatever_their_order():
    votes = [1, 2, 4, 8, 16]
    for groups in partitions(list(range(5))):
        expected = sorted(sum(votes[index] for index in group) for group in groups)
        chains = [pair for group in groups for pair in pairwise(group)]
        every = [pair for group in groups for pair in combinations(group, 2)]
        for pairs in (chains, chains[::-1], [(b, a) for a, b in chains], every):
            assert sorted(joined(votes, pairs)) == expected
