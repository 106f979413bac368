"""maj@n: whether the answer that a model gives most often is correct.

The samples of a question vote for what they answer; a sample without an answer does not vote. All correct answers are
one class, whatever they look like. Which wrong answers are the same is the caller's to say.
"""

from collections.abc import Iterable, Sequence


def majority(num_correct: int, wrong: Sequence[int]) -> float:
    """Probability that the answer with most votes is correct, if one of those with most is drawn at random.

    Args:
        num_correct: votes for the correct answer.
        wrong: votes for each wrong one.

    Returns:
        1 / (answers that share the most votes) if the correct one is among them, else 0; 0 if nothing was answered.
    """
    largest = max([num_correct, *wrong])
    if num_correct == 0 or num_correct < largest:
        return 0.0
    return 1.0 / (1 + sum(votes == largest for votes in wrong))


def is_open(num_correct: int, wrong: Sequence[int]) -> bool:
    """Whether `majority` could be another if some of the wrong answers were the same."""
    return len(wrong) > 1 and majority(num_correct, wrong) > 0 and sum(wrong) >= num_correct


def joined(votes: Sequence[int], same: Iterable[tuple[int, int]]) -> list[int]:
    """Votes for each class of answers.

    Args:
        votes: for each answer.
        same: pairs of indices of answers that are the same; so are those that a chain of pairs connects.
    """
    parent = list(range(len(votes)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    for one, other in same:
        parent[root(one)] = root(other)
    totals = [0] * len(votes)
    for index, number in enumerate(votes):
        totals[root(index)] += number
    return [total for total in totals if total]
