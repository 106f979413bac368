"""Packed attention in plain PyTorch, for where Transformer Engine is not: CPUs, and GPUs without it.

Megatron's own local attention refuses packed input. Segments attend causally within themselves only.
Shape suffixes: T tokens of this context-parallel rank, N heads, G query groups, D head_dim.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megavar.packing import context_parallel_order


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """A `core_attention` for packed (thd) tokens; under context parallelism it gathers keys and values."""

    def __init__(self, config: Any, layer_number: int, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_TND: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        attention_mask: None,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend; returns [T, N x D]."""
        assert packed_seq_params is not None, "this engine only runs packed sequences"
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        if parallel_state.get_context_parallel_world_size() > 1:
            return self._attend_over_ranks(query_TND, key_TGD, value_TGD, lengths)
        parts = zip(*(torch.split(tensor, lengths) for tensor in (query_TND, key_TGD, value_TGD)), strict=True)
        return torch.cat([self._attend(query, key, value, None) for query, key, value in parts])

    def _attend_over_ranks(self, query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, lengths: list[int]) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        size, rank = group.size(), group.rank()
        order = [torch.from_numpy(indices).to(query_TND.device) for indices in context_parallel_order(lengths, size)]
        back = torch.cat(order).argsort()
        whole_key, whole_value = (
            gather_from_sequence_parallel_region(tensor.contiguous(), group=group)[back]
            for tensor in (key_TGD, value_TGD)
        )
        outputs, first = [], 0
        held = [length // size for length in lengths]
        queries, positions = torch.split(query_TND, held), torch.split(order[rank], held)
        for length, query, at in zip(lengths, queries, positions, strict=True):
            segment = slice(first, first + length)
            seen = torch.arange(first, first + length, device=query.device)[None] <= at[:, None]
            outputs.append(self._attend(query, whole_key[segment], whole_value[segment], seen))
            first += length
        return torch.cat(outputs)

    def _attend(self, query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, seen: Tensor | None) -> Tensor:
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query_TND, key_TGD, value_TGD))
        if query.is_cuda:  # whose linear kernel for float32 and for masks knows no groups
            heads_per_group = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(heads_per_group, 1) for tensor in (key, value))
        output = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=seen,
            is_causal=seen is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output[0].transpose(0, 1).flatten(1)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing: attention has no parameters."""
        return {}


class RMSNorm(torch.nn.RMSNorm):
    """The local layers' norm. Megatron's wrapper of torch's refuses sequence parallelism (torch_norm.py:32);
    this one marks its weight, whose gradient is then summed over the tensor-parallel ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
