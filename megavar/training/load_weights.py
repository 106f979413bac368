"""Weights of a Hugging Face folder or Megatron checkpoint into the model chunks of this rank, piece by piece.

Megatron says which slice of which parameter each chunk holds, as it does for checkpoints; the family's operators make
the parameter. So no split over ranks is described here.
"""

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.utils import unwrap_model
from torch import Tensor

from megavar.checkpoints.convert import Model
from megavar.models.ops import Index


def load_weights(chunks: list[torch.nn.Module], model: Model) -> None:
    """Fill the chunks' parameters; every parameter has its source."""
    by_name = {operator.megatron_name: operator for operator in model.operators}
    for chunk in chunks:
        state = unwrap_model(chunk).sharded_state_dict()
        apply_factories(state)
        shards = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
        held: tuple[str, Index] | None = None
        piece = torch.empty(0)
        for shard in shards:
            index = tuple(shard.global_offset[: shard.prepend_axis_num])
            if held != (shard.key, index):  # gate and up are two slices of one piece
                held = (shard.key, index)
                piece = model.piece(by_name[shard.key], index)
            _fill(shard, piece)
        filled = sum(shard.data.numel() for shard in shards)
        wanted = sum(parameter.numel() for parameter in chunk.parameters())
        assert filled == wanted, f"{filled} of {wanted} values have a source in {model.path}"


def _fill(shard: ShardedTensor, piece: Tensor) -> None:
    """Copy this rank's slice of a piece; rows past its end pad the vocabulary."""
    part = piece
    for axis, (start, length) in enumerate(
        zip(shard.global_offset[shard.prepend_axis_num :], shard.local_shape, strict=True)
    ):
        part = part.narrow(axis, min(start, part.shape[axis]), min(length, max(0, part.shape[axis] - start)))
    with torch.no_grad():
        shard.data.zero_()
        shard.data.narrow(0, 0, part.shape[0]).copy_(part)
