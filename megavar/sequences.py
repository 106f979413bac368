"""A data set of training sequences in arrays: what packing, training and scoring read. Needs no torch.

A sequence is a prompt, a trace and perhaps an answer. Each of these texts is kept once, however many sequences it is
in: the correct answers of a trace share it, and the traces of a question share their prompt.
Shapes: N sequences.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray

from megavar.records import TokenIds, TrainSequence

NO_TEXT = -1
_NOTHING = np.zeros(0, np.int32)


class Texts(Protocol):
    """Token ids of each text by its number, such as Megatron's IndexedDataset."""

    def __getitem__(self, index: int) -> TokenIds: ...


@dataclass(frozen=True, eq=False)
class SequenceSet(Sequence[TrainSequence]):
    """Sequences by index, in memory or on disk."""

    texts: Texts
    parts: NDArray[np.int32]
    """[N, 3] numbers of the texts of prompt, trace and answer; `NO_TEXT`: no answer."""
    weights: NDArray[np.float64]
    """[N] weight of every target token in the loss."""
    num_tokens: NDArray[np.int32]
    """[N] of prompt and target together."""
    num_targets: NDArray[np.int32]
    """[N] tokens of trace and answer."""

    def __len__(self) -> int:
        return len(self.parts)

    @overload
    def __getitem__(self, index: int) -> TrainSequence: ...

    @overload
    def __getitem__(self, index: slice) -> "Sequence[TrainSequence]": ...

    def __getitem__(self, index: int | slice) -> "TrainSequence | Sequence[TrainSequence]":
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        prompt, trace, answer = self.parts[index].tolist()
        answer_ids = _NOTHING if answer == NO_TEXT else self.texts[answer]
        return TrainSequence(self.texts[prompt], self.texts[trace], float(self.weights[index]), answer_ids)


class TextNumbers:
    """Numbers the texts of sequences; an array that is in several is one text."""

    def __init__(self) -> None:
        self.num_texts = 0

    def add(self, sequences: Sequence[TrainSequence]) -> tuple[list[TokenIds], NDArray[np.int32]]:
        """Texts of these sequences that are not in one before, and [N, 3] the numbers of each sequence's texts."""
        new: list[TokenIds] = []
        number_of: dict[int, int] = {}

        def number(ids: TokenIds) -> int:
            if id(ids) not in number_of:
                number_of[id(ids)] = self.num_texts + len(new)
                new.append(ids)
            return number_of[id(ids)]

        parts = [
            (
                number(sequence.prompt_ids),
                number(sequence.trace_ids),
                number(sequence.answer_ids) if len(sequence.answer_ids) else NO_TEXT,
            )
            for sequence in sequences
        ]
        self.num_texts += len(new)
        return new, np.array(parts, np.int32).reshape(-1, 3)


def in_memory(sequences: Iterable[TrainSequence]) -> SequenceSet:
    """A set of a few sequences."""
    kept = list(sequences)
    texts, parts = TextNumbers().add(kept)
    return SequenceSet(
        texts,
        parts,
        np.array([sequence.weight for sequence in kept], np.float64),
        np.array([sequence.num_tokens for sequence in kept], np.int32),
        np.array([sequence.num_tokens - len(sequence.prompt_ids) for sequence in kept], np.int32),
    )
