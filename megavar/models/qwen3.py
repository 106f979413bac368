"""Qwen3, dense: Qwen2's layers without biases, with a norm on each head's query and key."""

from megavar.models import qwen2
from megavar.models.dims import ModelDims
from megavar.models.family import Family
from megavar.models.ops import Operator, Rename


def operators(dims: ModelDims) -> list[Operator]:
    """All parameters of the model."""
    return [*qwen2.outer(dims), *qwen2.attention(), *head_norms(), *qwen2.dense_mlp()]


def head_norms() -> list[Operator]:
    """The norms of a head's query and key, shared by the heads of a layer."""
    source, target = qwen2.LAYER + "self_attn.", qwen2.DECODER + "self_attention."
    return [Rename(f"{source}{part}_norm.weight", f"{target}{part}_layernorm.weight", ("head_dim",)) for part in "qk"]


FAMILY = Family(operators, qk_norm=True, head_dim=128, required={"attention_bias": False})
