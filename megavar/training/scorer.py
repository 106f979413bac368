"""Log-probs of given sequences under a model, by the same packed forward that trains it."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray

from megavar.checkpoints.convert import Model
from megavar.config.schema import ParallelConfig, PrecisionConfig
from megavar.packing import pack, partition
from megavar.records import LogProbs, TrainSequence
from megavar.training.forward_backward import pack_shape, score_pass
from megavar.training.load_weights import load_weights
from megavar.training.model import build_model, transformer_config


class Scorer:
    """A model loaded for scoring, split over the ranks."""

    def __init__(self, model: Model, parallel: ParallelConfig, precision: PrecisionConfig) -> None:
        self._parallel = parallel
        self._shape = pack_shape(parallel, precision)
        self._chunks = build_model(transformer_config(model.dims, parallel, precision, "none"), model.dims)
        load_weights(self._chunks, model)
        for chunk in self._chunks:
            chunk.eval()

    def score(
        self, sequences: Sequence[TrainSequence], temperature: float, microbatch_tokens: int
    ) -> list[LogProbs] | None:
        """Score each sequence's target tokens; all ranks call it with the same sequences.

        Returns:
            On rank 0 one [target tokens] float32 array of natural-log probabilities a sequence; None elsewhere.
        """
        lengths = [sequence.num_tokens for sequence in sequences]
        multiple = self._parallel.pipeline if self._parallel.virtual_pipeline > 1 else 1
        plan = partition(lengths, microbatch_tokens, parallel_state.get_data_parallel_world_size(), multiple)
        mine = plan[parallel_state.get_data_parallel_rank()]
        rank = parallel_state.get_context_parallel_rank()
        microbatches = [pack(sequences, indices, self._shape, rank) for indices in mine]
        local_logps = score_pass(self._chunks, microbatches, temperature)
        parts: list[tuple[NDArray[np.int64], NDArray[np.int64], LogProbs]] = []
        if local_logps and parallel_state.get_tensor_model_parallel_rank() == 0:
            parts = [
                (microbatch.sequence, microbatch.offset, logps)
                for microbatch, logps in zip(microbatches, local_logps, strict=True)
            ]
        gathered: list[list[tuple[NDArray[np.int64], NDArray[np.int64], LogProbs]]] | None = None
        if dist.get_rank() == 0:
            gathered = [[] for _ in range(dist.get_world_size())]
        dist.gather_object(parts, gathered)
        if gathered is None:
            return None
        result = [np.full(len(sequence.target_ids), np.nan, np.float32) for sequence in sequences]
        for sequence, offset, logps in (part for rank_parts in gathered for part in rank_parts):
            for index in np.unique(sequence):
                chosen = sequence == index
                result[index][offset[chosen]] = logps[chosen]
        incomplete = [index for index, logps in enumerate(result) if np.isnan(logps).any()]
        assert not incomplete, f"sequences {incomplete[:5]} came back without all their log-probs"
        return result

    def release(self) -> None:
        """Free the model's memory."""
        self._chunks = []
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
