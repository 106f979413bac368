"""Log-probs of given sequences under a model, by the same packed forward that trains it."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray

from megavar.checkpoints.convert import Model
from megavar.config.schema import ParallelConfig, PrecisionConfig
from megavar.packing import pack
from megavar.records import LogProbs
from megavar.sequences import SequenceSet
from megavar.training.forward_backward import pack_shape, plan_microbatches, score_pass
from megavar.training.hardware import release_memory
from megavar.training.load_weights import load_weights
from megavar.training.model import build_model, transformer_config

Part = tuple[NDArray[np.int64], NDArray[np.int64], LogProbs]
"""[S] sequence, offset in its targets, and log-prob of each scored position of a microbatch."""


class Scorer:
    """A model loaded for scoring, split over the ranks.

    Args:
        chunks: this rank's part of the model, if it is in memory already.
        fixed_tokens: `TrainConfig.fixed_tokens` of the training that these chunks come from.
    """

    def __init__(
        self,
        model: Model,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        chunks: list[torch.nn.Module] | None = None,
        fixed_tokens: int = 0,
    ) -> None:
        # Transformer Engine updates them on leaving the layers with gradients on (quantization.py, autocast_exit).
        assert precision.recipe != "fp8_delayed", "delayed scales stay 1 without a backward pass: use another recipe"
        self._parallel = parallel
        self._shape = pack_shape(parallel, precision, fixed_tokens)
        if chunks is None:
            chunks = build_model(transformer_config(model.dims, parallel, precision, "none"), model.dims)
            load_weights(chunks, model)
        self._chunks = chunks
        for chunk in self._chunks:
            chunk.eval()

    def score(
        self, sequences: SequenceSet, indices: Sequence[int], temperature: float, microbatch_tokens: int
    ) -> dict[int, LogProbs]:
        """Score the target tokens of the sequences with these indices; all ranks call it with the same ones.

        Returns:
            Index -> [target tokens] float32 natural-log probabilities. Each sequence is in the result of one rank:
            those of a data-parallel rank come back on its first rank of the last pipeline stage.
        """
        lengths = sequences.num_tokens[np.asarray(indices)].tolist()
        plan = plan_microbatches(lengths, microbatch_tokens, self._parallel, self._shape)
        mine = [[indices[place] for place in places] for places in plan[parallel_state.get_data_parallel_rank()]]
        context_rank = parallel_state.get_context_parallel_rank()
        microbatches = [pack(sequences, chosen, self._shape, context_rank) for chosen in mine]
        local_logps = score_pass(self._chunks, microbatches, temperature)
        if not local_logps or parallel_state.get_tensor_model_parallel_rank() > 0:
            return {}
        parts: list[Part] = [
            (microbatch.sequence, microbatch.offset, logps)
            for microbatch, logps in zip(microbatches, local_logps, strict=True)
        ]
        found = {
            index: np.full(sequences.num_targets[index], np.nan, np.float32) for chosen in mine for index in chosen
        }
        for sequence, offset, logps in _of_context_ranks(parts):
            for index in np.unique(sequence).tolist():
                chosen = sequence == index
                found[index][offset[chosen]] = logps[chosen]
        incomplete = [index for index, logps in found.items() if np.isnan(logps).any()]
        assert context_rank > 0 or not incomplete, f"sequences {incomplete[:5]} came back without all their log-probs"
        return {} if context_rank > 0 else found

    def score_all(self, sequences: SequenceSet, temperature: float, microbatch_tokens: int) -> list[LogProbs] | None:
        """Score a few sequences; [target tokens] of each on rank 0, None on the others. Every rank calls it."""
        found = self.score(sequences, range(len(sequences)), temperature, microbatch_tokens)
        gathered: list[dict[int, LogProbs]] | None = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(found, gathered)
        if gathered is None:
            return None
        logps_of = {index: logps for of_rank in gathered for index, logps in of_rank.items()}
        return [logps_of[index] for index in range(len(sequences))]

    def release(self) -> None:
        """Free the model's memory."""
        self._chunks = []
        release_memory()


def _of_context_ranks(parts: list[Part]) -> list[Part]:
    """On the first context-parallel rank the parts of all: each rank has a share of every sequence's tokens."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return parts
    gathered: list[list[Part]] | None = (
        [[] for _ in range(size)] if parallel_state.get_context_parallel_rank() == 0 else None
    )
    group = parallel_state.get_context_parallel_group()
    dist.gather_object(parts, gathered, dist.get_global_rank(group, 0), group)
    return [part for of_rank in gathered or [] for part in of_rank]
