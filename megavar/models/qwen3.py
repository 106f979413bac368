"""Qwen3 (dense): Qwen2's layers without biases, with normalised query and key heads."""

from megavar.models import qwen2
from megavar.models.dims import ModelDims
from megavar.models.family import Family
from megavar.models.ops import Operator, Rename


def operators(dims: ModelDims) -> list[Operator]:
    """All parameters of the model."""
    return [*qwen2.outer(dims), *qwen2.attention(), *qk_norms(), *qwen2.dense_mlp()]


def qk_norms() -> list[Operator]:
    """A layer's query and key norms, shared by its heads."""
    source, target = qwen2.LAYER + "self_attn.", qwen2.DECODER + "self_attention."
    return [Rename(f"{source}{part}_norm.weight", f"{target}{part}_layernorm.weight", ("head_dim",)) for part in "qk"]


FAMILY = Family(operators, qk_norm=True, head_dim=128, required={"attention_bias": False})
