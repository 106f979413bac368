"""Invertible operators between Hugging Face tensors and one tensor-parallel shard of a Megatron parameter.

A model family is a list of operators (`qwen2.py`, `qwen3.py`). Each knows the Hugging Face names it reads, the
Megatron name it makes (as Transformer Engine layers call it) and both directions; no second mapping exists.
Shape suffixes: Q query rows of a group, D head_dim, G query groups, H hidden, F feed-forward, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megavar.models.dims import ModelDims


class Operator(Protocol):
    """One Megatron parameter and the Hugging Face tensors that make it; `{layer}` in names is the layer index."""

    @property
    def megatron_name(self) -> str:
        """Name in a Megatron model."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Names of the source tensors, in the order `shard` takes them."""

    def hf_shapes(self, dims: ModelDims) -> list[tuple[int, ...]]:
        """Shapes of the source tensors."""

    def shard(self, tensors: list[Tensor], dims: ModelDims, rank: int, size: int) -> Tensor:
        """The parameter of tensor-parallel rank `rank` of `size`."""

    def unshard(self, shards: list[Tensor], dims: ModelDims) -> list[Tensor]:
        """The source tensors, from the parameter's shards in rank order."""


@dataclass(frozen=True)
class Replicate:
    """The same vector on every rank: norm weights."""

    hf_name: str
    megatron_name: str
    size_of: str

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.hf_name,)

    def hf_shapes(self, dims: ModelDims) -> list[tuple[int, ...]]:
        return [(getattr(dims, self.size_of),)]

    def shard(self, tensors: list[Tensor], dims: ModelDims, rank: int, size: int) -> Tensor:
        return tensors[0]

    def unshard(self, shards: list[Tensor], dims: ModelDims) -> list[Tensor]:
        return [shards[0]]


@dataclass(frozen=True)
class SplitColumns:
    """A row-parallel linear layer, split along its input: attention output [H, heads x D], MLP down [H, F]."""

    hf_name: str
    megatron_name: str

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.hf_name,)

    def hf_shapes(self, dims: ModelDims) -> list[tuple[int, ...]]:
        inputs = dims.ffn_size if "mlp" in self.megatron_name else dims.num_heads * dims.head_dim
        return [(dims.hidden_size, inputs)]

    def shard(self, tensors: list[Tensor], dims: ModelDims, rank: int, size: int) -> Tensor:
        return tensors[0].chunk(size, dim=1)[rank]

    def unshard(self, shards: list[Tensor], dims: ModelDims) -> list[Tensor]:
        return [torch.cat(shards, dim=1)]


@dataclass(frozen=True)
class Vocabulary:
    """An embedding or output table [V, H], padded with zero rows to a multiple of the ranks, split along rows."""

    hf_name: str
    megatron_name: str

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.hf_name,)

    def hf_shapes(self, dims: ModelDims) -> list[tuple[int, ...]]:
        return [(dims.vocab_size, dims.hidden_size)]

    def shard(self, tensors: list[Tensor], dims: ModelDims, rank: int, size: int) -> Tensor:
        rows = dims.padded_vocab_size(size) // size
        mine = tensors[0][rank * rows : (rank + 1) * rows]
        return torch.nn.functional.pad(mine, (0, 0, 0, rows - mine.shape[0]))

    def unshard(self, shards: list[Tensor], dims: ModelDims) -> list[Tensor]:
        return [torch.cat(shards)[: dims.vocab_size]]


@dataclass(frozen=True)
class StackGateUp:
    """Gate and up projections [F, H] in one column-parallel layer; every rank holds [gate shard; up shard]."""

    gate: str
    up: str
    megatron_name: str

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def hf_shapes(self, dims: ModelDims) -> list[tuple[int, ...]]:
        return [(dims.ffn_size, dims.hidden_size)] * 2

    def shard(self, tensors: list[Tensor], dims: ModelDims, rank: int, size: int) -> Tensor:
        return torch.cat([tensor.chunk(size)[rank] for tensor in tensors])

    def unshard(self, shards: list[Tensor], dims: ModelDims) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[part] for half in halves]) for part in (0, 1)]


@dataclass(frozen=True)
class InterleaveQkv:
    """Query, key and value projections, row blocks [Q queries, key, value] for each query group; kind weight or bias.

    Groups are split over the ranks, so the ranks must divide `num_query_groups`.
    """

    prefix: str
    megatron_name: str
    kind: str

    @property
    def hf_names(self) -> tuple[str, ...]:
        return tuple(f"{self.prefix}{part}_proj.{self.kind}" for part in "qkv")

    def hf_shapes(self, dims: ModelDims) -> list[tuple[int, ...]]:
        tail = (dims.hidden_size,) if self.kind == "weight" else ()
        rows_q, rows_kv = dims.num_heads * dims.head_dim, dims.num_query_groups * dims.head_dim
        return [(rows_q, *tail), (rows_kv, *tail), (rows_kv, *tail)]

    def shard(self, tensors: list[Tensor], dims: ModelDims, rank: int, size: int) -> Tensor:
        tail = tensors[0].shape[1:]
        grouped = [tensor.reshape(dims.num_query_groups, -1, *tail).chunk(size)[rank] for tensor in tensors]
        return torch.cat(grouped, dim=1).reshape(-1, *tail)

    def unshard(self, shards: list[Tensor], dims: ModelDims) -> list[Tensor]:
        whole = torch.cat(shards)
        tail = whole.shape[1:]
        rows = dims.num_heads // dims.num_query_groups * dims.head_dim
        grouped = whole.reshape(dims.num_query_groups, -1, *tail)
        parts = torch.split(grouped, [rows, dims.head_dim, dims.head_dim], dim=1)
        return [part.reshape(-1, *tail) for part in parts]
