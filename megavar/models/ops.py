"""Invertible operators between Hugging Face tensors and Megatron parameters.

A model family is a list of operators (`qwen2.py`, `qwen3.py`, `qwen3_moe.py`). Each maps Hugging Face tensors to one
Megatron parameter and back; both directions of conversion use the same list. Megatron names are those of its sharded
checkpoints, which are the same for Transformer Engine and local layers. There the parameter of all layers (and experts)
is one tensor with leading axes [layers, (experts,)]. A "piece" is its slice for one layer (and expert), and an operator
converts one piece. Pieces are full size; Megatron itself shards them over tensor-parallel ranks.
Shape suffixes: G query groups, R rows of a projection in one group. In shapes: D head_dim, H hidden, F feed-forward.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from megavar.models.dims import ModelDims

Index = tuple[int, ...]
"""Index of a piece: () outside the layers, (layer,) or (layer, expert)."""


class Operator(Protocol):
    """Maps Hugging Face tensors, whose names may contain `{layer}` and `{expert}`, to one Megatron parameter."""

    @property
    def megatron_name(self) -> str:
        """Name in a Megatron checkpoint."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Names of the Hugging Face tensors, in the order of `merge`."""

    def hf_shapes(self, dims: ModelDims) -> list[tuple[int, ...]]:
        """Shapes of the Hugging Face tensors."""

    def merge(self, tensors: list[Tensor], dims: ModelDims) -> Tensor:
        """Hugging Face tensors -> piece of the Megatron parameter; exact."""

    def split(self, piece: Tensor, dims: ModelDims) -> list[Tensor]:
        """Piece of the Megatron parameter -> Hugging Face tensors; the inverse of `merge`."""


def leading_axes(operator: Operator, dims: ModelDims) -> Index:
    """Sizes of the parameter's leading axes: (), (layers,) or (layers, experts)."""
    sizes = {"{layer}": dims.num_layers, "{expert}": dims.num_experts}
    return tuple(size for placeholder, size in sizes.items() if placeholder in operator.hf_names[0])


def piece_shape(operator: Operator, dims: ModelDims) -> tuple[int, ...]:
    """Shape of one piece of the parameter, without the leading axes: every operator joins its tensors along rows."""
    first, *others = operator.hf_shapes(dims)
    return (first[0] + sum(shape[0] for shape in others), *first[1:])


def joined(tensors: list[Tensor]) -> Tensor:
    """Concatenate tensors along rows: without a copy if they lie behind one another in memory."""
    first, start = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        is_next = tensor.data_ptr() == first.data_ptr() + (start - first.storage_offset()) * first.itemsize
        same_kind = tensor.dtype == first.dtype and tensor.shape[1:] == first.shape[1:] and tensor.is_contiguous()
        if not (is_next and same_kind and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()):
            return torch.cat(tensors)
        start += tensor.numel()
    return first.as_strided((sum(len(tensor) for tensor in tensors), *first.shape[1:]), first.stride())


def names_at(operator: Operator, index: Index) -> list[str]:
    """Names of the Hugging Face tensors of one piece."""
    values = dict(zip(("layer", "expert"), index, strict=False))
    return [name.format(**values) for name in operator.hf_names]


def pieces(operators: list[Operator], dims: ModelDims) -> Iterator[tuple[Operator, Index]]:
    """All pieces of the model, each once: those outside the layers first, then layer by layer."""
    items = [
        (operator, index)
        for operator in operators
        for index in product(*(range(size) for size in leading_axes(operator, dims)))
    ]
    return iter(sorted(items, key=lambda item: item[1][:1]))


@dataclass(frozen=True)
class Rename:
    """One tensor under another name; `sizes` are the fields of `ModelDims` that form its shape."""

    hf_name: str
    megatron_name: str
    sizes: tuple[str, ...]

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.hf_name,)

    def hf_shapes(self, dims: ModelDims) -> list[tuple[int, ...]]:
        return [tuple(getattr(dims, size) for size in self.sizes)]

    def merge(self, tensors: list[Tensor], dims: ModelDims) -> Tensor:
        return tensors[0]

    def split(self, piece: Tensor, dims: ModelDims) -> list[Tensor]:
        return [piece]


@dataclass(frozen=True)
class StackGateUp:
    """Gate and up projections, [F, H] each, stacked into one [2F, H]."""

    gate: str
    up: str
    megatron_name: str

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def hf_shapes(self, dims: ModelDims) -> list[tuple[int, ...]]:
        return [(dims.ffn_size, dims.hidden_size)] * 2

    def merge(self, tensors: list[Tensor], dims: ModelDims) -> Tensor:
        return joined(tensors)

    def split(self, piece: Tensor, dims: ModelDims) -> list[Tensor]:
        return list(piece.chunk(2))


@dataclass(frozen=True)
class InterleaveQkv:
    """Query, key and value projections interleaved by query group: [G x (queries, key, value), H]."""

    prefix: str
    megatron_name: str
    kind: str
    """`weight` or `bias`."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        return tuple(f"{self.prefix}{part}_proj.{self.kind}" for part in "qkv")

    def hf_shapes(self, dims: ModelDims) -> list[tuple[int, ...]]:
        tail = (dims.hidden_size,) if self.kind == "weight" else ()
        rows_kv = dims.num_query_groups * dims.head_dim
        return [(dims.query_size, *tail), (rows_kv, *tail), (rows_kv, *tail)]

    def merge(self, tensors: list[Tensor], dims: ModelDims) -> Tensor:
        tail = tensors[0].shape[1:]
        grouped_GR = [tensor.reshape(dims.num_query_groups, -1, *tail) for tensor in tensors]
        return torch.cat(grouped_GR, dim=1).reshape(-1, *tail)

    def split(self, piece: Tensor, dims: ModelDims) -> list[Tensor]:
        tail = piece.shape[1:]
        rows = dims.query_size // dims.num_query_groups
        grouped_GR = piece.reshape(dims.num_query_groups, -1, *tail)
        parts = torch.split(grouped_GR, [rows, dims.head_dim, dims.head_dim], dim=1)
        return [part.reshape(-1, *tail) for part in parts]
