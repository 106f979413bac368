"""Qwen3, dense: Qwen2's layers without biases, with a norm on each head's query and key."""

from megavar.models import qwen2
from megavar.models.dims import ModelDims
from megavar.models.ops import Operator, Replicate


def operators(dims: ModelDims) -> list[Operator]:
    """All parameters of the model; names with `{layer}` exist once a layer."""
    attention, decoder = qwen2.LAYER + "self_attn.", qwen2.DECODER + "self_attention."
    norms: list[Operator] = [
        Replicate(attention + f"{part}_norm.weight", decoder + f"{part}_layernorm.weight", "head_dim") for part in "qk"
    ]
    return qwen2.operators(dims) + norms
