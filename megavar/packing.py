"""Packs weighted sequences into microbatches and balances them over data-parallel ranks. Needs no torch.

A microbatch is one row of concatenated sequences ("segments") with block-causal attention. The last token of a sequence
is a target only, never an input. With context parallelism each segment is split into 2 x CP chunks, and rank r holds
chunks r and 2 x CP - 1 - r, the layout of Transformer Engine's packed attention, which balances causal attention.
All ranks compute the same plan from the same sequences, without communication.
Shapes: T tokens of the microbatch on this context-parallel rank, S of its positions that are trained or scored.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megavar.records import TrainSequence


@dataclass(frozen=True)
class PackShape:
    """Constraints of parallelism and precision on the size of a microbatch."""

    context_parallel: int = 1
    total_multiple: int = 1
    """The total tokens of a microbatch, over all context-parallel ranks, are padded to a multiple of this."""
    least_tokens: int = 0
    """The total tokens are padded to at least as many: with a budget of as many, all microbatches have one length."""

    @property
    def segment_multiple(self) -> int:
        """Each segment is padded to a multiple of this many tokens."""
        return 2 * self.context_parallel if self.context_parallel > 1 else 1

    def whole(self, tokens: int) -> int:
        """The least total tokens of a microbatch that hold so many."""
        return tokens + -tokens % math.lcm(self.total_multiple, self.segment_multiple)

    def segment_tokens(self, lengths: Sequence[int]) -> list[int]:
        """Tokens of the segments that sequences of these lengths become; padding of the microbatch is the last."""
        segments = [length - 1 + -(length - 1) % self.segment_multiple for length in lengths]
        padding = self.whole(max(self.least_tokens, sum(segments), 1)) - sum(segments)
        return [*segments, padding] if padding else segments


@dataclass(frozen=True, eq=False)
class Microbatch:
    """One packed microbatch, as held by one context-parallel rank."""

    token_ids: NDArray[np.int64]
    """[T] input tokens."""
    segment_lengths: tuple[int, ...]
    """Tokens of each segment over all context-parallel ranks; the last segment may be padding."""
    positions: NDArray[np.int64]
    """[S] indices into token_ids of the inputs whose next token is trained or scored."""
    targets: NDArray[np.int64]
    """[S] the ids of those next tokens."""
    weights: NDArray[np.float32]
    """[S] weight of the sequence that the target belongs to."""
    sequence: NDArray[np.int64]
    """[S] index of that sequence in the list passed to `pack`."""
    offset: NDArray[np.int64]
    """[S] index of the target within the sequence's `target_ids`."""


def data_order(num_sequences: int, start: int, stop: int, seed: int) -> list[int]:
    """Sequence indices at positions [start, stop) of an infinite stream of shuffled epochs.

    Depends on the arguments only, so it is the same on every rank and after every restart.
    """
    order: list[int] = []
    for epoch in range(start // num_sequences, (stop - 1) // num_sequences + 1):
        first = epoch * num_sequences
        shuffled = _shuffled(num_sequences, seed, epoch)
        order += shuffled[max(start - first, 0) : stop - first].tolist()
    return order


@lru_cache(maxsize=2)  # of the epochs at whose border a batch may be
def _shuffled(num_sequences: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num_sequences)


def partition(lengths: Sequence[int], budget_tokens: int, num_ranks: int, multiple: int = 1) -> list[list[list[int]]]:
    """Distribute sequences over data-parallel ranks and microbatches.

    Greedy: the longest remaining sequence goes into the emptiest microbatch.

    Args:
        lengths: tokens of each sequence.
        budget_tokens: maximum tokens of a microbatch.
        num_ranks: data-parallel size.
        multiple: microbatches per rank are a multiple of this (pipeline size under the interleaved schedule).

    Returns:
        [ranks][microbatches] sorted lists of indices into `lengths`. All ranks have the same number of microbatches;
        some may be empty.

    Raises:
        ValueError: if one sequence exceeds the budget.
    """
    longest = max(lengths)
    if longest > budget_tokens:
        raise ValueError(
            f"A sequence of {longest} tokens does not fit in microbatch_tokens={budget_tokens}; raise it or lower "
            "data.max_sequence_tokens."
        )
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    unit = num_ranks * multiple
    num_bins = unit * math.ceil(sum(lengths) / budget_tokens / unit)
    while True:
        heap = [(0, bin_index) for bin_index in range(num_bins)]
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        fits = True
        for index in order:
            tokens, bin_index = heapq.heappop(heap)
            fits = fits and tokens + lengths[index] <= budget_tokens
            bins[bin_index].append(index)
            heapq.heappush(heap, (tokens + lengths[index], bin_index))
        if fits:
            return [[sorted(bins[index]) for index in range(rank, num_bins, num_ranks)] for rank in range(num_ranks)]
        num_bins += unit


def pack(sequences: Sequence[TrainSequence], indices: Sequence[int], shape: PackShape, rank: int = 0) -> Microbatch:
    """Pack `sequences[i]` for i in `indices`, in this order, into one microbatch.

    Args:
        rank: context-parallel rank whose part is returned.
    """
    chosen = [sequences[index] for index in indices]
    lengths = shape.segment_tokens([sequence.num_tokens for sequence in chosen])
    full = _concatenate(chosen, indices, lengths)
    if shape.context_parallel == 1:
        return full
    local = context_parallel_order(lengths, shape.context_parallel)[rank]
    local_index = np.full(len(full.token_ids), -1)
    local_index[local] = np.arange(len(local))
    kept = local_index[full.positions] >= 0
    return Microbatch(
        token_ids=full.token_ids[local],
        segment_lengths=full.segment_lengths,
        positions=local_index[full.positions][kept],
        targets=full.targets[kept],
        weights=full.weights[kept],
        sequence=full.sequence[kept],
        offset=full.offset[kept],
    )


def context_parallel_order(lengths: Sequence[int], size: int) -> list[NDArray[np.int64]]:
    """Per context-parallel rank, the indices of its tokens in the full microbatch, in the rank's local order.

    Args:
        lengths: tokens of each segment, multiples of 2 x `size`.
        size: context-parallel size.
    """
    chunks_of: list[list[NDArray[np.int64]]] = [[] for _ in range(size)]
    start = 0
    for length in lengths:
        chunks = np.arange(start, start + length).reshape(2 * size, -1)
        for rank in range(size):
            chunks_of[rank] += [chunks[rank], chunks[2 * size - 1 - rank]]
        start += length
    return [np.concatenate(parts) for parts in chunks_of]


def _concatenate(sequences: Sequence[TrainSequence], indices: Sequence[int], lengths: list[int]) -> Microbatch:
    """The microbatch before it is split; segments without a sequence are padding."""
    num_targets = [sequence.num_tokens - len(sequence.prompt_ids) for sequence in sequences]
    size = sum(num_targets)
    token_ids = np.zeros(sum(lengths), np.int64)
    positions, targets, offset = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
    start = first = 0
    for sequence, index, length, count in zip(sequences, indices, lengths, num_targets, strict=False):
        num_prompt = len(sequence.prompt_ids)
        assert num_prompt > 0, f"sequence {index} has no prompt"
        target_ids, last = sequence.target_ids, first + count
        token_ids[start : start + num_prompt] = sequence.prompt_ids
        token_ids[start + num_prompt : start + num_prompt + count - 1] = target_ids[:-1]
        targets[first:last] = target_ids
        offset[first:last] = np.arange(count)
        np.add(offset[first:last], start + num_prompt - 1, out=positions[first:last])
        start, first = start + length, last
    weights = np.repeat(np.array([sequence.weight for sequence in sequences], np.float32), num_targets)
    return Microbatch(
        token_ids,
        tuple(lengths),
        positions,
        targets,
        weights,
        np.repeat(np.array(indices, np.int64), num_targets),
        offset,
    )
