"""Packing loses, doubles and mixes nothing, at any budget and split."""

import numpy as np
import pytest

from megavar.packing import PackShape, context_parallel_order, data_order, pack, partition
from megavar.records import TrainSequence


def sequence(prompt, target, weight=1.0):
    return TrainSequence(np.array(prompt, np.int32), np.array(target, np.int32), weight)


def test_pack_places_each_target_after_its_input():
    packed = pack([sequence([1, 2], [3, 4], 0.5), sequence([5], [6], 2.0)], [0, 1], PackShape())
    assert packed.token_ids.tolist() == [1, 2, 3, 5]  # the last token of a sequence is never an input
    assert packed.segment_lengths == (3, 1)
    assert packed.positions.tolist() == [1, 2, 3]
    assert packed.targets.tolist() == [3, 4, 6]
    assert packed.weights.tolist() == [0.5, 0.5, 2.0]
    assert packed.sequence.tolist() == [0, 0, 1]
    assert packed.offset.tolist() == [0, 1, 0]


def test_padding_is_a_segment_of_its_own_without_targets():
    packed = pack([sequence([1, 2], [3, 4])], [0], PackShape(total_multiple=8))
    assert packed.segment_lengths == (3, 5)
    assert len(packed.token_ids) == 8
    assert packed.positions.max() < 3


def test_an_empty_microbatch_is_padding_only():
    packed = pack([], [], PackShape())
    assert len(packed.token_ids) == 1 and len(packed.positions) == 0


@pytest.mark.parametrize("size", [2, 3])
def test_context_parallel_ranks_hold_every_token_once_with_equal_causal_work(size):
    lengths = [4 * size, 2 * size]
    held = context_parallel_order(lengths, size)
    assert sorted(np.concatenate(held).tolist()) == list(range(sum(lengths)))
    first_segment = [sum(index + 1 for index in rank if index < lengths[0]) for rank in held]
    assert len(set(first_segment)) == 1  # the keys that the rank's queries see


@pytest.mark.parametrize("size", [1, 2, 4])
def test_context_parallel_ranks_together_have_every_target_once(size):
    sequences = [sequence([1, 2, 3], list(range(10, 17))), sequence([4], [5, 6])]
    found = []
    for rank in range(size):
        packed = pack(sequences, [0, 1], PackShape(context_parallel=size), rank)
        found += list(zip(packed.sequence.tolist(), packed.offset.tolist(), packed.targets.tolist(), strict=True))
        assert len(packed.token_ids) == sum(packed.segment_lengths) // size
    expected = [(0, at, 10 + at) for at in range(7)] + [(1, 0, 5), (1, 1, 6)]
    assert sorted(found) == expected


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("multiple", [1, 2])
def test_partition_gives_every_sequence_once_within_the_budget_and_balanced(ranks, multiple):
    lengths = np.random.default_rng(0).integers(5, 60, 40).tolist()
    plan = partition(lengths, 100, ranks, multiple)
    assert len({len(rank) for rank in plan}) == 1 and len(plan[0]) % multiple == 0
    assert sorted(index for rank in plan for part in rank for index in part) == list(range(40))
    tokens = [sum(lengths[index] for index in part) for rank in plan for part in rank]
    assert max(tokens) <= 100
    assert max(tokens) - min(tokens) <= max(lengths)


def test_a_sequence_over_the_budget_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"101 tokens.*microbatch_tokens=100"):
        partition([10, 101], 100, 1)


def test_data_order_is_every_sequence_once_an_epoch_and_the_same_from_any_start():
    whole = data_order(10, 0, 30, seed=3)
    assert [sorted(whole[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert data_order(10, 7, 23, seed=3) == whole[7:23]
    assert data_order(10, 0, 10, seed=4) != whole[:10]
    assert whole[:10] != whole[10:20]
