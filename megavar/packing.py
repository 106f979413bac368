"""Weighted sequences -> packed microbatches: no padding between sequences, tokens balanced over the ranks.

A microbatch is one row of tokens holding whole sequences ("segments") behind one another; attention is
block-causal inside it. A sequence's last token is never an input, since nothing follows it. With context
parallelism each segment is cut into 2 x CP chunks, of which rank r holds chunks r and 2 x CP - 1 - r (as
Transformer Engine's packed attention expects), so that every rank has the same causal work.
Shape suffixes: T tokens of the microbatch on this context-parallel rank, S scored positions among them.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megavar.records import TrainSequence


@dataclass(frozen=True)
class PackShape:
    """What the engine's parallelism and precision ask of a microbatch's size."""

    context_parallel: int = 1
    total_multiple: int = 1
    """The tokens of a microbatch (over all context-parallel ranks) are padded to a multiple of this."""

    @property
    def segment_multiple(self) -> int:
        """Each segment is padded to a multiple of this."""
        return 2 * self.context_parallel if self.context_parallel > 1 else 1


@dataclass(frozen=True, eq=False)
class Microbatch:
    """One packed microbatch, as one context-parallel rank sees it."""

    token_ids: NDArray[np.int64]
    """[T] input tokens."""
    segment_lengths: tuple[int, ...]
    """Tokens of each segment over all context-parallel ranks; a last one may be padding."""
    positions: NDArray[np.int64]
    """[S] indices into token_ids whose next token is trained or scored."""
    targets: NDArray[np.int64]
    """[S] those next tokens."""
    weights: NDArray[np.float32]
    """[S] the weight of the sequence each belongs to."""
    sequence: NDArray[np.int64]
    """[S] index of that sequence in the list that was packed."""
    offset: NDArray[np.int64]
    """[S] which of the sequence's target tokens it is."""


def data_order(num_sequences: int, start: int, stop: int, seed: int) -> list[int]:
    """Entries start..stop of the endless stream of shuffled epochs; the same for every rank and every restart."""
    order: list[int] = []
    for epoch in range(start // num_sequences, (stop - 1) // num_sequences + 1):
        first = epoch * num_sequences
        shuffled = np.random.default_rng([seed, epoch]).permutation(num_sequences)
        order += shuffled[max(start - first, 0) : stop - first].tolist()
    return order


def partition(lengths: Sequence[int], budget_tokens: int, num_ranks: int, multiple: int = 1) -> list[list[list[int]]]:
    """Distribute sequences over data-parallel ranks and microbatches, longest first into the emptiest.

    Args:
        lengths: tokens of each sequence.
        budget_tokens: the most tokens a microbatch may hold.
        num_ranks: data-parallel size.
        multiple: the number of microbatches is a multiple of this (pipeline size under interleaving).

    Returns:
        For each rank its microbatches, each a sorted list of indices into `lengths`; every rank has the same number
        of microbatches, and some may be empty.

    Raises:
        ValueError: if a sequence alone is over the budget.
    """
    longest = max(lengths)
    if longest > budget_tokens:
        raise ValueError(
            f"A sequence of {longest} tokens does not fit in microbatch_tokens={budget_tokens}; raise that, "
            "or lower data.max_sequence_tokens."
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
            return [[sorted(bins[at]) for at in range(rank, num_bins, num_ranks)] for rank in range(num_ranks)]
        num_bins += unit


def pack(sequences: Sequence[TrainSequence], indices: Sequence[int], shape: PackShape, rank: int = 0) -> Microbatch:
    """Pack `sequences[i]` for each i of `indices` into the microbatch of context-parallel rank `rank`."""
    segments = [_segment(sequences[index], index, shape) for index in indices]
    lengths = [len(segment.token_ids) for segment in segments]
    padding = -sum(lengths) % shape.total_multiple or (0 if segments else shape.total_multiple)
    padding += -padding % shape.segment_multiple
    if padding:
        segments.append(_padding_segment(padding))
        lengths.append(padding)
    whole = _concatenate(segments, lengths)
    if shape.context_parallel == 1:
        return whole
    mine = context_parallel_order(lengths, shape.context_parallel)[rank]
    place = np.full(len(whole.token_ids), -1)
    place[mine] = np.arange(len(mine))
    kept = place[whole.positions] >= 0
    return Microbatch(
        token_ids=whole.token_ids[mine],
        segment_lengths=whole.segment_lengths,
        positions=place[whole.positions][kept],
        targets=whole.targets[kept],
        weights=whole.weights[kept],
        sequence=whole.sequence[kept],
        offset=whole.offset[kept],
    )


def context_parallel_order(lengths: Sequence[int], size: int) -> list[NDArray[np.int64]]:
    """For each context-parallel rank, the indices of its tokens in the whole microbatch, in its local order."""
    held: list[list[NDArray[np.int64]]] = [[] for _ in range(size)]
    start = 0
    for length in lengths:
        chunks = np.arange(start, start + length).reshape(2 * size, -1)
        for rank in range(size):
            held[rank] += [chunks[rank], chunks[2 * size - 1 - rank]]
        start += length
    return [np.concatenate(parts) for parts in held]


def _segment(sequence: TrainSequence, index: int, shape: PackShape) -> Microbatch:
    ids = np.concatenate([sequence.prompt_ids, sequence.target_ids]).astype(np.int64)
    num_targets = len(sequence.target_ids)
    assert len(sequence.prompt_ids) > 0, f"sequence {index} has no prompt"
    inputs = ids[:-1]
    return Microbatch(
        token_ids=np.pad(inputs, (0, -len(inputs) % shape.segment_multiple)),
        segment_lengths=(),
        positions=np.arange(len(inputs) - num_targets, len(inputs)),
        targets=ids[len(ids) - num_targets :],
        weights=np.full(num_targets, sequence.weight, np.float32),
        sequence=np.full(num_targets, index),
        offset=np.arange(num_targets),
    )


def _padding_segment(length: int) -> Microbatch:
    none = np.zeros(0, np.int64)
    return Microbatch(np.zeros(length, np.int64), (), none, none, np.zeros(0, np.float32), none, none)


def _concatenate(segments: list[Microbatch], lengths: list[int]) -> Microbatch:
    starts = np.cumsum([0, *lengths[:-1]])
    return Microbatch(
        token_ids=np.concatenate([segment.token_ids for segment in segments]),
        segment_lengths=tuple(lengths),
        positions=np.concatenate([segment.positions + at for segment, at in zip(segments, starts, strict=True)]),
        targets=np.concatenate([segment.targets for segment in segments]),
        weights=np.concatenate([segment.weights for segment in segments]),
        sequence=np.concatenate([segment.sequence for segment in segments]),
        offset=np.concatenate([segment.offset for segment in segments]),
    )
