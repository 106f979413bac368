"""Invertible operators between Hugging Face tensors and Megatron's parameters.

A model family is a list of operators (`qwen2.py`, `qwen3.py`, `qwen3_moe.py`). Each names the Hugging Face tensors it
takes and the Megatron parameter it makes of them, in both directions; no second mapping exists. Megatron's names are
those in its sharded checkpoints, which Transformer Engine and local layers share. There a parameter that every layer
(and every expert) has is one tensor with leading axes [layers, (experts,)]; an operator makes one piece of it.
Tensor-parallel ranks hold slices of these tensors, which Megatron cuts by itself.
Shape suffixes: G query groups, R rows of a projection in one group, D head_dim, H hidden, F feed-forward.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from megavar.models.dims import ModelDims

Index = tuple[int, ...]
"""Which piece of a parameter: (), (layer,) or (layer, expert)."""


class Operator(Protocol):
    """One Megatron parameter and the Hugging Face tensors that make it, whose names hold `{layer}` and `{expert}`."""

    @property
    def megatron_name(self) -> str:
        """Name in a Megatron checkpoint."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Names of the source tensors, in the order `merge` takes them."""

    def hf_shapes(self, dims: ModelDims) -> list[tuple[int, ...]]:
        """Shapes of the source tensors."""

    def merge(self, tensors: list[Tensor], dims: ModelDims) -> Tensor:
        """The piece of the parameter that the source tensors make."""

    def split(self, piece: Tensor, dims: ModelDims) -> list[Tensor]:
        """The source tensors of a piece."""


def leading_axes(operator: Operator, dims: ModelDims) -> Index:
    """Sizes of the parameter's leading axes: (), (layers,) or (layers, experts)."""
    sizes = {"{layer}": dims.num_layers, "{expert}": dims.num_experts}
    return tuple(size for mark, size in sizes.items() if mark in operator.hf_names[0])


def piece_shape(operator: Operator, dims: ModelDims) -> tuple[int, ...]:
    """Shape of a piece of the parameter, without the leading axes."""
    nothing = [torch.empty(shape, device="meta") for shape in operator.hf_shapes(dims)]
    return tuple(operator.merge(nothing, dims).shape)


def names_at(operator: Operator, index: Index) -> list[str]:
    """Names of the Hugging Face tensors of one piece."""
    marks = dict(zip(("layer", "expert"), index, strict=False))
    return [name.format(**marks) for name in operator.hf_names]


def pieces(operators: list[Operator], dims: ModelDims) -> Iterator[tuple[Operator, Index]]:
    """Every piece of the model once: what is outside the layers, then layer by layer."""
    every = [
        (operator, index)
        for operator in operators
        for index in product(*(range(size) for size in leading_axes(operator, dims)))
    ]
    return iter(sorted(every, key=lambda item: item[1][:1]))


@dataclass(frozen=True)
class Rename:
    """One tensor under another name. `sizes` are the fields of `ModelDims` that make its shape."""

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
    """Gate and up projections [F, H] each, in one [2F, H]."""

    gate: str
    up: str
    megatron_name: str

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def hf_shapes(self, dims: ModelDims) -> list[tuple[int, ...]]:
        return [(dims.ffn_size, dims.hidden_size)] * 2

    def merge(self, tensors: list[Tensor], dims: ModelDims) -> Tensor:
        return torch.cat(tensors)

    def split(self, piece: Tensor, dims: ModelDims) -> list[Tensor]:
        return list(piece.chunk(2))


@dataclass(frozen=True)
class InterleaveQkv:
    """Query, key and value projections in one: queries, key and value of each query group. Kind: weight or bias."""

    prefix: str
    megatron_name: str
    kind: str

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
